"""`uvit-fast evaluate`: FID, sFID, Inception score, precision, recall, KID of samples."""

import argparse
import os
import sys
from pathlib import Path

from uvit_fast.commands.arguments import (
    config_of,
    existing,
    positive,
    precision_argument,
    reference_arguments,
    reference_is_config,
    seed,
    set_argument,
    with_precision,
)
from uvit_fast.config import Config, load_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.importing import preload

HELP = "measure FID, sFID, Inception score, precision, recall and KID"
EXAMPLE = "uvit-fast evaluate --checkpoint runs/digits --num 1797 --reference digits --features digits-fid"


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("samples that are there")
    group.add_argument("--samples", metavar="PATH", help="a folder of images, or an .npz with arr_0")
    group = command.add_argument_group("or samples that are drawn")
    group.add_argument("--checkpoint", metavar="PATH", help="a run, a pipeline folder, or .pth, .safetensors")
    group.add_argument("--config", metavar="NAME", help="by name, as h2_256, or file; a run has its own")
    group.add_argument("--num", type=positive, default=50_000, metavar="N", help="images (default 50000)")
    group.add_argument("--classes", metavar="LIST", help="as cat,dog or 207,360, also of --reference")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of noise and labels (default 0)")
    precision_argument(group)
    group.add_argument("--save-images", metavar="DIR", help="keep them as PNGs in this new folder")
    reference_arguments(command.add_argument_group("what they are compared with"))
    group = command.add_argument_group("how, and where to")
    set_argument(group, "override of both configs; again for more")
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        metavar="NAME",
        help="cpu, cuda; default: a GPU if any",
    )
    group.add_argument("--batch", type=positive, default=50, metavar="N", help="images at a time (default 50)")
    group.add_argument("--out", metavar="FILE", help="JSON (default <samples>.evaluation.json)")


def run(args: argparse.Namespace) -> None:
    """Measure samples, from a file or freshly drawn, against real images; print the figures and write them.

    `torchrun -m -- uvit_fast.cli evaluate ...` divides samples and real images among all GPUs of a host.
    """
    from uvit_fast.runtime.processes import World

    with World() as world:
        _run(args, world)


def _run(args: argparse.Namespace, world) -> None:
    if bool(args.samples) == bool(args.checkpoint) or (args.config and args.samples):
        raise UserError("evaluate: expected either --samples, or --checkpoint with the --config that it needs")
    if args.precision is not None and not args.checkpoint:
        raise UserError("evaluate: --precision is of samples that are drawn; expected --checkpoint")
    if args.classes is not None and not args.checkpoint:
        raise UserError("evaluate: --classes are of samples that are drawn; expected --checkpoint")
    if args.samples:
        existing("--samples", args.samples, "a folder of images, or an .npz with arr_0")
    is_config = reference_is_config(args.reference, args.features)
    if not is_config:
        existing("--reference", args.reference, "statistics, images, or a config whose data are the real images")
    real = load_config(args.reference, args.set) if is_config else args.reference
    overrides = with_precision(args.set, args.precision)
    cfg = config_of(args.config, args.checkpoint, overrides) if args.checkpoint else None

    preload("uvit_fast.measuring", "uvit_fast.evaluation.evaluate")
    from uvit_fast import measuring
    from uvit_fast.data.reading import shown
    from uvit_fast.evaluation import evaluate as figures
    from uvit_fast.evaluation.reference import default_cache
    from uvit_fast.runtime.device import pick_device

    device = pick_device(args.device)
    cache = Path(args.cache) if args.cache else default_cache()
    samples, *chosen = _drawn(args, cfg, device, world) if cfg else (measuring.open_images(Path(args.samples)),)
    weights, name = (args.inception, args.download), shown(args.reference)
    extractor, statistics = measuring.yardstick(
        args.features, real, name, weights, device, cache, args.batch, world, *chosen
    )
    result = figures.evaluate(samples, statistics, extractor, args.batch, world=world)
    if result is None:  # rank 0 has it
        return
    if args.classes is not None and not is_config:
        result["warnings"].append(
            f"classes {args.classes} only: the figures compare where the reference is of these alone"
        )
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(figures.table(result))
    source = os.path.normpath(args.samples or args.checkpoint)
    if os.path.basename(source) in (os.curdir, os.pardir):
        source = os.path.abspath(source)
    out = Path(args.out or f"{source}.evaluation.json")
    try:
        figures.write(result, out)
    except OSError as error:
        raise UserError(f"{shown(str(out))}: cannot be written ({error.strerror}); --out names another file") from None
    print(f"wrote {shown(str(out))}")


def _drawn(args: argparse.Namespace, cfg: Config, device, world):
    """Return a checkpoint's samples, drawn while they are measured, the requested labels, or None, and their names."""
    from uvit_fast import measuring
    from uvit_fast.data.autoencoders import load_decoder
    from uvit_fast.data.reading import shown
    from uvit_fast.sampling.conditions import chosen_labels
    from uvit_fast.sampling.weights import find_weights, load_found, provenance_of

    checkpoint = find_weights(args.checkpoint)
    known, classes = provenance_of(cfg, checkpoint), None
    if args.classes is not None:
        classes = chosen_labels(args.classes, cfg, known)
    folder = Path(args.save_images) if args.save_images else None
    if folder and world.rank == 0 and folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--save-images {shown(str(folder))}: holds files already; expected a new name or an empty folder"
        )
    model = load_found(cfg, checkpoint, device)
    decode = load_decoder(cfg, device, known, alone=args.whole) if cfg.latent else None
    name = shown(args.checkpoint)
    samples = measuring.drawn_images(model, cfg, args.num, name, decode, args.seed, folder, classes, known)
    return samples, classes, known
