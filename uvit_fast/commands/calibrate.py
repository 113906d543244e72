"""`uvit-fast calibrate`: make a plan of cached layers from trajectories of a checkpoint."""

import argparse
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from uvit_fast.commands.arguments import checkpoint_arguments, config_of, number, positive, seed
from uvit_fast.config import Config, ModelConfig
from uvit_fast.runtime.errors import UserError

HELP = "make a plan of cached layers (sample.cache) from trajectories"
EXAMPLE = "uvit-fast calibrate --checkpoint runs/digits --speedup 1.5 --out plan.yaml"


def arguments(command: argparse.ArgumentParser) -> None:
    checkpoint_arguments(command)
    group = command.add_argument_group("plan")
    group.add_argument(
        "--speedup", type=number, required=True, metavar="X", help="to reach, in multiply-adds, such as 1.5"
    )
    group.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new .yaml or .json file")
    group = command.add_argument_group("what it is measured on")
    group.add_argument("--num", type=positive, default=16, metavar="N", help="trajectories, in one batch (default 16)")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of their noise and classes (default 0)")


def run(args: argparse.Namespace) -> None:
    """Write the plan; print what it saves, and how far its samples are from uncached ones, compared with fewer
    evaluations.
    """
    cfg = config_of(args.config, args.checkpoint, args.set)
    if not 1 < args.speedup < math.inf:
        raise UserError(f"--speedup: expected a number above 1, got {args.speedup:g}")
    if args.out.suffix not in (".yaml", ".yml", ".json") or args.out.exists():
        raise UserError(f"--out {args.out}: expected a new file that ends in .yaml or .json")
    if not isinstance(cfg.model, ModelConfig) or cfg.sample.precision != "bf16" or cfg.sample.cache != "none":
        raise UserError("calibrate: expected a U-ViT with sample.precision bf16 and sample.cache none")
    if cfg.model.context_dim:
        raise UserError(f"calibrate: {cfg.name} takes text; expected a model of classes, or without a condition")

    import torch

    from uvit_fast.build import build_sampler
    from uvit_fast.commands.cost import count
    from uvit_fast.config.plans import CachePlan, contracted, write_plan
    from uvit_fast.model.cached import sublayers
    from uvit_fast.model.uvit import UViT
    from uvit_fast.runtime.device import pick_device
    from uvit_fast.sampling import calibration
    from uvit_fast.sampling.caches import cached_layers, sublayer_macs
    from uvit_fast.sampling.captured import on_a_gpu
    from uvit_fast.sampling.conditions import chosen_labels
    from uvit_fast.sampling.loop import check_finite, sample
    from uvit_fast.sampling.weights import find_weights, load_found, provenance_of

    device = pick_device(cfg.device)
    weights = find_weights(args.checkpoint)
    known = provenance_of(cfg, weights)
    model = load_found(cfg, weights, device)
    assert isinstance(model, UViT)
    names, steps = sublayers(cfg.model.depth), cfg.sample.steps

    def options(of: int) -> dict:
        classes = torch.tensor(chosen_labels(None, cfg, known) if cfg.model.num_classes else [0])
        drawn = classes[torch.randint(len(classes), (args.num,), generator=torch.Generator().manual_seed(of))]
        return {"seed": of, "labels": drawn if cfg.model.num_classes else None}

    def draw(config, of: int, evaluations: int | None = None) -> tuple[torch.Tensor, float]:
        """Return x_0 (num, C, H, W), and the seconds of the second run."""
        graphs = on_a_gpu(model)
        for _ in range(2):
            began = time.perf_counter()
            (x,) = sample(model, config, args.num, batch=args.num, steps=evaluations, graphs=graphs, **options(of))
            x = check_finite(x, "the samples").cpu()
        return x, time.perf_counter() - began

    print(f"measuring {args.num} trajectories of {steps} evaluations", flush=True)
    errors = calibration.measure(model, cfg, args.num, names, **options(args.seed))
    stages, costs = build_sampler(cfg).stages, sublayer_macs(cfg)
    candidates = calibration.find(
        errors, calibration.stage_weights(stages), names, costs * (len(names) // 2), count(cfg)[1], args.speedup
    )

    def written(found: calibration.Found, file: Path, about: str = "") -> Config:
        """Return the config with that plan, which is written to `file`."""
        reuse = {i: contracted(names, each) for i, each in enumerate(found.plan) if each}
        write_plan(CachePlan(about=about, steps=steps, sampler=cfg.sample.sampler, reuse=reuse), file)
        return cfg.model_copy(update={"sample": cfg.sample.model_copy(update={"cache": str(file.absolute())})})

    def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
        return float((x - exact).norm() / exact.norm())

    whole, whole_seconds = draw(cfg, args.seed)
    with TemporaryDirectory() as folder:
        plans = [written(each, Path(folder) / f"{i}.yaml") for i, each in enumerate(candidates)]
        distances = [distance(draw(plan, args.seed)[0], whole) for plan in plans]
    found = candidates[distances.index(min(distances))]
    about = (
        f"of {args.checkpoint}, {args.num} trajectories, seed {args.seed}, guidance {cfg.sample.guidance_scale:g}: "
        f"weighted relative errors of at most {found.bound:.3g}, {found.speedup:.2f} times fewer multiply-adds"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    planned = written(found, args.out, about)
    fewer = max(1, round(steps / found.speedup))
    print(f"{args.out}: {about}")
    print(
        cached_layers(
            planned,
            build_sampler(planned).stages,
            args.num,
            cfg.sample.guidance_scale > 0,
            next(model.parameters()).element_size(),
        )
    )
    print(f"{'':34}seconds   distance from {steps} uncached evaluations, on the same noise and on other noise")
    other, _ = draw(cfg, args.seed + 1)
    print(f"{f'{steps} uncached evaluations':34}{whole_seconds:7.2f}")
    for name, config, evaluations in (("the plan", planned, None), (f"{fewer} uncached evaluations", cfg, fewer)):
        (x, seconds), (y, _) = draw(config, args.seed, evaluations), draw(config, args.seed + 1, evaluations)
        print(f"{name:34}{seconds:7.2f}   {distance(x, whole):.4f}   {distance(y, other):.4f}")
    print(f"use it: --set sample.cache={args.out}; uvit-fast front compares its quality with fewer evaluations")
