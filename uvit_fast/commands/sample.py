"""`uvit-fast sample`: sample images from a checkpoint."""

import argparse
import hashlib
import math
import os
from pathlib import Path

from uvit_fast.commands.arguments import (
    checkpoint_arguments,
    config_of,
    number,
    positive,
    precision_argument,
    seed,
    with_precision,
)
from uvit_fast.config import Config, find_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.importing import preload

HELP = "sample images from a checkpoint"
FEW = 8  # images in one batch that are drawn sooner as written, by calls that replay themselves, than captured first
EXAMPLE = "uvit-fast sample --checkpoint runs/digits --num 16 --classes 3,7 --out digits"


def arguments(command: argparse.ArgumentParser) -> None:
    checkpoint_arguments(command)
    group = command.add_argument_group("what is drawn")
    group.add_argument("--num", type=positive, default=16, metavar="N", help="images (default 16)")
    group.add_argument("--classes", metavar="LIST", help="as cat,dog or 207,360 (default: all, evenly)")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="for a text model; repeat for more, evenly")
    group.add_argument("--prompts", metavar="FILE", help="for a text model: one prompt per line")
    group.add_argument("--clip", metavar="NAME", help="text encoder, folder or hub name; default: the data's")
    group.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="sample i depends on it and i only (default 0)"
    )
    group = command.add_argument_group("how")
    group.add_argument("--steps", type=positive, metavar="N", help="evaluations per sample; default: the config's")
    group.add_argument(
        "--cfg-scale", type=number, metavar="X", help="guidance: 1 + the paper's s; default: the config's"
    )
    precision_argument(group)
    group.add_argument("--batch", type=positive, metavar="N", help="images at a time (default: GPU 250, CPU 50)")
    group = command.add_argument_group("output")
    group.add_argument(
        "--out", required=True, metavar="PATH", help="new: a folder of PNGs, .npz (ADM's), .png (a grid)"
    )
    group.add_argument("--format", choices=["png", "npz"], help="default: as --out ends, else png")
    group.add_argument("--resume", action="store_true", help="continue an interrupted job, with the same settings")
    command.set_defaults(goes_on="with --resume continues")


def run(args: argparse.Namespace) -> None:
    """Sample images; write PNGs and a labelled grid into a folder, or an .npz."""
    from uvit_fast.runtime.processes import World

    with World() as world:
        _run(args, world)


def _run(args: argparse.Namespace, world) -> None:
    cfg = config_of(args.config, args.checkpoint, with_precision(args.set, args.precision))
    out = _out(args)
    scale = None if args.cfg_scale is None else args.cfg_scale - 1  # the paper's s
    if scale is not None and not 0 <= scale < math.inf:
        raise UserError(f"--cfg-scale: expected at least 1 (no guidance), got {args.cfg_scale}")
    prompts = _prompts(args, cfg)

    preload("uvit_fast.data.autoencoders", "uvit_fast.sampling")
    import numpy as np

    from uvit_fast.build import build_sampler
    from uvit_fast.data.autoencoders import load_decoder
    from uvit_fast.data.encoders import load_text, text_encoder_name
    from uvit_fast.runtime.device import pick_device
    from uvit_fast.sampling.caches import cached_layers
    from uvit_fast.sampling.captured import on_a_gpu
    from uvit_fast.sampling.conditions import check_guidance, chosen_labels, spread, spread_labels
    from uvit_fast.sampling.images import to_uint8
    from uvit_fast.sampling.jobs import Job
    from uvit_fast.sampling.loop import check_finite, sample
    from uvit_fast.sampling.output import sample_names, save_npz, save_pngs
    from uvit_fast.sampling.weights import find_weights, load_found, provenance_of

    check_guidance(scale or 0.0, cfg)
    plan = build_sampler(
        cfg, args.steps
    ).stages  # a plan of cached layers that does not fit is reported before the weights are read
    device = pick_device(cfg.device)
    checkpoint = find_weights(args.checkpoint)
    known, labels = provenance_of(cfg, checkpoint), None
    if cfg.model.num_classes or args.classes is not None:
        labels = spread_labels(args.num, chosen_labels(args.classes, cfg, known))
    model = load_found(cfg, checkpoint, device)
    decode = load_decoder(cfg, device, known, alone=args.whole) if cfg.latent else None

    options = {"steps": args.steps, "guidance_scale": scale, "seed": args.seed, "labels": labels}
    if prompts:
        prompts, clip = spread(args.num, prompts), args.clip or text_encoder_name(cfg, known)
        encode, options["null_context"] = load_text(cfg, clip, device, known)
        options["context"] = lambda rows: encode(prompts[rows.start : rows.stop])
    batch = args.batch or (250 if device.type == "cuda" else 50)
    few = args.num <= min(batch, FEW) and cfg.sample.cache == "none"
    graphs = None if few else on_a_gpu(model, decode)
    decode = decode if decode and graphs is None else lambda x: x
    if cfg.sample.cache != "none" and world.rank == 0:
        guided = (cfg.sample.guidance_scale if scale is None else scale) > 0
        print(cached_layers(cfg, plan, min(batch, args.num), guided, next(model.parameters()).element_size()))

    def draw(first: int, last: int) -> np.ndarray:
        batches = sample(model, cfg, last, first=first, batch=batch, graphs=graphs, **options)
        what = f"samples {first} to {last - 1}"
        return np.concatenate([to_uint8(check_finite(decode(x), what)) for x in batches])

    settings = {name: getattr(args, name) for name in ("set", "num", "classes", "seed", "steps", "cfg_scale")}
    settings["config"] = args.config and os.path.abspath(find_config(args.config))
    decides = cfg.model_dump_json(include={"model", "diffusion", "latent", "sample"})
    settings["contents of the config"] = hashlib.sha256(decides.encode()).hexdigest()
    if cfg.sample.cache != "none":  # a plan's file may change
        settings["cached layers"] = [sorted(stage.layers.reuse) if stage.layers else [] for stage in plan]
    # in a run that goes on, the newest checkpoint may be another one tomorrow
    settings["checkpoint"] = os.path.abspath(checkpoint)
    settings["prompts"] = prompts and hashlib.sha256("\n".join([clip, *prompts]).encode()).hexdigest()
    job = Job(out, settings, args.num, batch, args.resume, world)
    if not job.run(draw):  # another rank writes
        return
    numbers = None if labels is None else labels.tolist()
    captions = prompts if numbers is None else [known.name(label) for label in numbers]
    if out.suffix.lower() == ".npz":
        classes = None if labels is None else labels.numpy()
        job.collect(lambda path: save_npz(path, job.images(), args.num, classes))
    elif out.suffix.lower() == ".png":
        job.collect(lambda path: _save_grid(path, job.images(), args.num, captions if args.num > 1 else None))
    else:
        save_pngs(out, job.images(), sample_names(numbers, prompts, known))
        _save_grid(out / "grid.png", job.images(), args.num, captions)
        if prompts:
            (out / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    job.close()
    print(f"wrote {args.num} images to {out}")


def _out(args: argparse.Namespace) -> Path:
    """Return where the images go: a folder, or a name that ends in .npz or .png.

    Raises:
        UserError: a name that contradicts --format or --num, or whose suffix is for another kind of file.
    """
    out = Path(args.out)
    suffix = out.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".zip"):
        raise UserError(f"--out {out}: expected a new folder, or a name that ends in .npz or .png")
    if args.format and suffix == {"png": ".npz", "npz": ".png"}[args.format]:
        raise UserError(f"--format {args.format}: expected --out to name a folder or a .{args.format}, got {out}")
    if suffix == ".png" and args.num > 100:
        raise UserError(f"--out {out}: a picture shows up to 100 images; expected a folder for {args.num}")
    return out.with_name(out.name + ".npz") if args.format == "npz" and suffix != ".npz" else out


def _prompts(args: argparse.Namespace, cfg: Config) -> list[str] | None:
    """Return the prompts for a text model; None for others.

    Raises:
        UserError: prompts for a model that takes none, none for one that does, or both ways of giving them.
    """
    if args.prompt is None and args.prompts is None:
        if cfg.model.context_dim and not cfg.sample.prompts:
            raise UserError(f"sample: {cfg.name} takes text; expected --prompt or --prompts")
        return list(cfg.sample.prompts) or None
    if not cfg.model.context_dim:
        kind = "classes" if cfg.model.num_classes else "no condition"
        raise UserError(f"--prompt: {cfg.name} takes {kind}, not text; expected no prompt")
    if args.prompt and args.prompts:
        raise UserError("--prompt and --prompts: expected one of them, got both")
    if args.prompt:
        return args.prompt
    try:
        text = Path(args.prompts).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {args.prompts}: expected a text file with one prompt per line ({error})") from None
    prompts = [
        line.strip() for line in text.split("\n") if line.strip()
    ]  # lines may contain other characters at which Unicode breaks lines
    if not prompts:
        raise UserError(f"--prompts {args.prompts}: expected one prompt per line, got an empty file")
    return prompts


def _save_grid(path: Path, batches, num: int, captions: list[str] | None) -> None:
    """Save the first hundred images, ten per row, with their classes or prompts; a single one without them as it is."""
    import numpy as np

    from uvit_fast.sampling.images import as_picture, save_grid, save_png

    images: list[np.ndarray] = []
    for batch in batches:
        images += [*batch[: 100 - len(images)]]
        if len(images) == min(100, num):
            break
    if num == 1 and captions is None:
        save_png(as_picture(images[0]), path)
    else:
        save_grid(np.stack(images), path, columns=min(10, num), captions=captions and captions[: len(images)])
