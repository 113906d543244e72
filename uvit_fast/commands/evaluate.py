"""`uvit-fast evaluate`: FID, sFID, Inception score, precision, recall, KID of samples."""

import argparse
import os
import sys
from pathlib import Path

from uvit_fast.commands.arguments import config_of, existing, positive, precision_argument, seed, with_precision
from uvit_fast.config import Config, load_config
from uvit_fast.runtime.errors import UserError

HELP = "FID, sFID, Inception score, precision, recall, KID of samples"
EXAMPLE = "uvit-fast evaluate --checkpoint runs/digits --num 1797 --reference configs/digits.yaml --features digits-fid"


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--samples", help="a folder of images, or an .npz with arr_0; or draw them, with:")
    command.add_argument("--config", help="the YAML file of the model to sample from; a run folder has its own")
    command.add_argument("--checkpoint", help="its weights: .pth, .safetensors, or a run folder")
    precision_argument(command)
    command.add_argument("--num", type=positive, default=50_000, help="samples to draw (default 50000)")
    command.add_argument("--seed", type=seed, default=0, help="of the drawn samples and their labels (default 0)")
    command.add_argument(
        "--classes", help="draw these only, as cat,dog or 207,360; of --reference YAML, too (default: all)"
    )
    command.add_argument(
        "--save-images", metavar="DIR", help="keep the drawn samples as PNGs in this new folder (default: not written)"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, as data.path=/my/images; also of --reference YAML",
    )
    command.add_argument(
        "--reference",
        required=True,
        help="statistics (.npz of ADM or pytorch-fid), images (folder or .npz), or a YAML whose data are the real images",
    )
    command.add_argument(
        "--features",
        choices=["inception", "digits-fid"],
        default="inception",
        help="digits-fid: of a small classifier, trained on the labelled data of --reference YAML; no FID",
    )
    command.add_argument("--inception", metavar="FILE", help="the weight file; default: among torch.hub's downloads")
    command.add_argument("--download", action="store_true", help="fetch the weight file where it is missing")
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if any")
    command.add_argument("--batch", type=positive, default=50, help="images at a time (default 50)")
    command.add_argument("--cache", help="folder for statistics of real images (default ~/.cache/uvit-fast)")
    command.add_argument("--out", help="JSON of the figures; default: beside the samples, <samples>.evaluation.json")


def run(args: argparse.Namespace) -> None:
    """Measure samples, of a file or fresh ones, against real images; print the figures and write them.

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
    existing("--reference", args.reference, "statistics, images, or a YAML whose data are the real images")
    is_config = Path(args.reference).suffix in (".yaml", ".yml")
    real = load_config(args.reference, args.set) if is_config else args.reference
    overrides = with_precision(args.set, args.precision)
    cfg = config_of(args.config, args.checkpoint, overrides) if args.checkpoint else None

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
    """Samples of a checkpoint, drawn while they are measured, the labels that were asked for, or None, and their names."""
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
    decode = load_decoder(cfg, device, known) if cfg.latent else None
    name = shown(args.checkpoint)
    samples = measuring.drawn_images(model, cfg, args.num, name, decode, args.seed, folder, classes, known)
    return samples, classes, known
