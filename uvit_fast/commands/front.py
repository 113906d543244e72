"""`uvit-fast front`: quality against time of one checkpoint, over samplers and settings, and the best of them."""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from uvit_fast.commands.arguments import (
    checkpoint_arguments,
    config_of,
    existing,
    positive,
    reference_arguments,
    reference_is_config,
)
from uvit_fast.commands.points import Point, Table, as_good, draw, key_of, pareto, row_of, summarised
from uvit_fast.config import Config, config_from, load_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole
from uvit_fast.runtime.importing import preload
from uvit_fast.runtime.text import shown

HELP = "measure quality against time, over samplers and settings"
EXAMPLE = "uvit-fast front --checkpoint runs/digits --reference digits --features digits-fid --steps 50,25,12"


def arguments(command: argparse.ArgumentParser) -> None:
    checkpoint_arguments(command)
    reference_arguments(command.add_argument_group("what it is compared with, as by evaluate"))
    group = command.add_argument_group("every combination of (default of each: the config's)")
    group.add_argument("--samplers", metavar="LIST", help="as dpm_fast,dpmpp_2m")
    group.add_argument("--steps", metavar="LIST", help="evaluations, as 50,25,12")
    group.add_argument("--cfg-scales", metavar="LIST", help="1 + s for the paper's s, as 1,1.4")
    group.add_argument("--intervals", metavar="LIST", help="times with guidance, as 0:1,0.1:0.8")
    group.add_argument("--precisions", metavar="LIST", help="bf16,fp8")
    group.add_argument("--plans", metavar="LIST", help="cached layers, as none,outer:2,plan.yaml")
    group = command.add_argument_group("how, and where to")
    group.add_argument("--num", type=positive, default=10_000, metavar="N", help="samples per point (default 10000)")
    group.add_argument("--seeds", type=positive, default=1, metavar="N", help="measurements per point (default 1)")
    group.add_argument("--batch", type=positive, metavar="N", help="images at a time (250 on a GPU, or 50)")
    group.add_argument("--out", type=Path, metavar="DIR", help="new, or to continue (default runs/front_<name>)")
    group.add_argument("--draw", action="store_true", help="only redraw what --out holds")
    command.set_defaults(goes_on="continues")


def run(args: argparse.Namespace) -> None:
    """Measure every point that is not measured yet, write the table after each, then the picture and the best points.

    The same command continues where it stopped; other points join the existing ones. `torchrun -m -- uvit_fast.cli
    front ...` divides the samples of each point among all GPUs of a host.
    """
    cfg = config_of(args.config, args.checkpoint, args.set)
    if not reference_is_config(args.reference, args.features):
        existing("--reference", args.reference, "statistics, images, or a config whose data are the real images")
    if args.num < 2:
        raise UserError(f"--num: expected at least 2 images, of which a covariance is taken, got {args.num}")
    out = args.out or Path("runs") / f"front_{cfg.name}"
    points = grid(args, cfg)
    from uvit_fast.commands.drawing import pyplot
    from uvit_fast.runtime.processes import World

    pyplot()  # fails now, rather than after hours, if matplotlib is missing
    with World() as world:
        if not args.draw:
            _measure_all(args, cfg, points, out, world)
        if world.rank == 0:
            _conclude(cfg, out)


def grid(args: argparse.Namespace, cfg: Config) -> list[Point]:
    """Return the requested points, each once, those of one precision together.

    Raises:
        UserError: a value that no config accepts.
    """
    sample = cfg.sample

    def values(option: str, default: Any, parse: Callable[[str], Any]) -> list:
        text = getattr(args, option)
        if text is None:
            return [default]
        try:
            return [parse(part) for part in text.split(",")]
        except ValueError:
            raise UserError(f"--{option.replace('_', '-')}: expected {example[option]}, got {shown(text)}") from None

    example = {"steps": "numbers, as 50,25", "cfg_scales": "numbers, as 1,1.4", "intervals": "as 0:1,0.1:0.8"}

    def interval(text: str) -> tuple[float, float]:
        first, last = map(float, text.split(":"))
        return first, last

    axes = (
        values("precisions", sample.precision, str),
        values("samplers", sample.sampler, str),
        values("steps", sample.steps, int),
        values("cfg_scales", sample.guidance_scale, lambda text: round(float(text) - 1, 9)),
        values("intervals", sample.guidance_interval, interval),
        values("plans", sample.cache, str),
    )
    points: dict[Point, None] = {}
    for precision, sampler, steps, scale, inside, cache in itertools.product(*axes):
        where = inside if scale else (0.0, 1.0)  # without guidance all intervals are one point
        changed = load_checked(cfg, Point(sampler, steps, scale, where, precision, cache))
        points[Point(sampler, steps, scale, where, precision, changed.sample.cache)] = None
    return list(points)


def load_checked(cfg: Config, point: Point) -> Config:
    """Return the config of a point.

    Raises:
        UserError: values that the config refuses.
    """
    tree = cfg.model_dump(mode="json")
    tree["sample"] |= point.settings()
    return config_from(tree, Path("front"))


def _measure_all(args: argparse.Namespace, cfg: Config, points: list[Point], out: Path, world) -> None:
    preload("uvit_fast.measuring")
    from uvit_fast import measuring
    from uvit_fast.build import build_sampler
    from uvit_fast.data.autoencoders import load_decoder
    from uvit_fast.evaluation.reference import default_cache
    from uvit_fast.runtime.device import pick_device
    from uvit_fast.sampling.captured import GraphSampler
    from uvit_fast.sampling.conditions import check_guidance
    from uvit_fast.sampling.weights import check_precision, find_weights, load_found, provenance_of

    device, weights = pick_device(cfg.device), find_weights(args.checkpoint)
    known = provenance_of(cfg, weights)
    batch = args.batch or (250 if device.type == "cuda" else 50)
    wanted: list[tuple[Point, Config, str, int]] = []
    left_out: dict[str, list[tuple[Point, str]]] = {}  # what was expected -> which points, and why
    for point in points:
        try:
            changed = load_checked(cfg, point)
            check_guidance(point.scale, cfg)
            check_precision(changed, device)
            plan = [sorted(s.layers.reuse) if s.layers else [] for s in build_sampler(changed).stages]
        except UserError as error:  # a plan is for one sampler and number of evaluations
            left_out.setdefault(str(error).partition(", got")[0], []).append((point, str(error)))
            continue
        contents = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:12] if any(plan) else ""
        wanted += [(point, changed, contents, of) for of in range(args.seeds)]
    if not wanted:
        raise UserError(f"front: no point is left to measure: {next(iter(left_out.values()))[0][1]}")

    real = (
        load_config(args.reference, args.set) if reference_is_config(args.reference, args.features) else args.reference
    )
    table, rows = Table(out), []
    told: tuple[str | None, list[tuple]] = (None, [])
    if world.rank == 0:
        for (first, why), *others in left_out.values():
            more = f" and {len(others)} more" * bool(others)
            print(f"left out: {first}{more}: {why}", flush=True)
        what = cfg.model_dump(mode="json", include={"model", "diffusion", "latent"})
        what |= cfg.sample.model_dump(mode="json", include={"spacing", "shift", "fp8_keep"})  # common to all points
        settings = {
            "checkpoint": str(weights.absolute()),
            "bytes": [weights.stat().st_size, weights.stat().st_mtime_ns],
            "config": hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest(),
            "reference": args.reference,
            "features": args.features,
            "num": args.num,
            "batch": batch,
            "processes": world.size,
        }
        refusal = table.claim(settings)
        rows = [] if refusal else table.rows()
        told = (refusal, [key_of(row) for row in rows])
    refusal, there = world.tell(told)
    if refusal:
        raise UserError(refusal)
    todo = [each for each in wanted if key_of(row_of(*each)) not in set(there)]
    if not todo:
        return
    cache = Path(args.cache) if args.cache else default_cache()
    inception = (args.inception, args.download)
    extractor, reference = measuring.yardstick(
        args.features, real, shown(args.reference), inception, device, cache, batch, world
    )
    decode = load_decoder(cfg, device, known, alone=args.whole) if cfg.latent else None
    costs = [point.steps * (1 + (point.scale > 0)) for point, *_ in todo]
    began, model, loaded = time.monotonic(), None, ""
    graphs: tuple[Point, GraphSampler] | None = None  # the loop that the seeds of a point share
    for i, (point, changed, contents, of) in enumerate(todo):
        if loaded != point.precision:
            model = graphs = None  # frees their memory first
            model, loaded = load_found(changed, weights, device), point.precision
        assert model is not None  # loaded above
        captures = device.type == "cuda" and (graphs is None or graphs[0] != point)
        if captures:
            graphs = None  # as above
            graphs = point, GraphSampler(model, decode)
        samples = measuring.drawn_images(
            model, changed, args.num, str(point), decode, of, known=known, graphs=graphs[1] if graphs else None
        )
        timed = _Timed(samples.read, reference.size, captures)
        try:
            found = _distance(replace(samples, read=timed), reference, extractor, batch, world)
        except UserError as error:  # samples that are no images
            if world.size > 1:  # the others do not know it
                raise
            print(f"left out: {point}, seed {of}: {error}", flush=True)
            continue
        seconds = world.gather(timed.seconds())
        if found is None:
            continue
        row = row_of(point, changed, contents, of) | {
            "images": args.num,
            "metric": f"{extractor.prefix}fid",
            "figure": f"{found:.6g}",
        }
        rows.append(row | {"seconds": f"{1000 * max(seconds):.6g}", "batch": batch, "device": _name(device)})
        table.write(rows)
        left = (time.monotonic() - began) / sum(costs[: i + 1]) * sum(costs[i + 1 :])
        print(
            f"{i + 1} of {len(todo)}: {point}, seed {of}: {row['metric']} {found:.4g}, "
            f"{1000 * max(seconds):.4g} s per 1,000 images; {_minutes(left)} left",
            flush=True,
        )


class _Timed:
    """A reader of drawn images that times the drawing alone, as the median over the batches.

    On a GPU, a point's first seed has one more batch before, which captures the loop. Partial batches do not count if
    there are full ones.
    """

    def __init__(self, read: Callable[[list[range]], Iterator], size: tuple[int, int] | None, warm_up: bool):
        self.read, self.size, self.warm_up = read, size, warm_up
        self.batches: list[tuple[int, float]] = []

    def __call__(self, parts: list[range]) -> Iterator:
        if self.warm_up and parts:
            next(self.read(parts[:1]))
        images = self.read(parts)
        for _ in parts:
            began = time.perf_counter()
            array = next(images)  # on the host: the device has finished
            self.batches.append((len(array), time.perf_counter() - began))
            if self.size not in (None, array.shape[1:3]):
                raise UserError(
                    f"front: samples of {array.shape[2]} x {array.shape[1]} pixels; the reference has {self.size}"
                )
            yield array

    def seconds(self) -> float:
        """Return the seconds per image; 0 if this process drew none."""
        most = max((size for size, _ in self.batches), default=1)
        took = [seconds for size, seconds in self.batches if size == most]
        return statistics.median(took) / most if took else 0.0


def _distance(samples, reference, extractor, batch: int, world) -> float | None:
    """Return the Fréchet distance alone, on rank 0."""
    from uvit_fast.evaluation.features import extract
    from uvit_fast.evaluation.metrics import frechet_distance

    found = extract(samples, extractor, batch, sys.stderr.isatty(), world)
    return None if found is None else float(frechet_distance(found.pool_statistics, reference.pool_statistics))


def _name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _conclude(cfg: Config, out: Path) -> None:
    """Draw front.png, write front.txt and print it."""
    rows = Table(out).rows()
    if not rows:
        raise UserError(f"{out}: no points.csv; expected a folder that `uvit-fast front` wrote")
    points = summarised(rows)
    front, metric = pareto(points), rows[0]["metric"]
    lines = [f"seconds of 1,000 images  {metric}  options"]
    lines += [f"{each.seconds:12.4g}  {each.figure:10.4g}  {each.point.lines(cfg)}" for each in front]
    text = "\n".join([*lines, *as_good(points)]) + "\n"
    write_whole(out / "front.txt", lambda file: file.write_text(text, "utf-8"))
    draw(points, front, rows[0], out / "front.png")
    print(text + f"wrote {out / 'points.csv'}, {out / 'front.png'} and {out / 'front.txt'}")
