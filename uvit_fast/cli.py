"""`uvit-fast <command>`: each command is a function of parsed arguments; a user's mistake is one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from uvit_fast.config import UserError, load_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="uvit-fast", description="U-ViT: sample, inspect, measure.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    command = _add(commands, "info", info, "versions, devices, and which kernels and attention would run, and why")
    command.add_argument("--config", help="report for this config's model only")

    command = _add(commands, "sample", sample, "draw images from a checkpoint")
    _config_arguments(command)
    command.add_argument(
        "--checkpoint", required=True, help=".pth, .safetensors, or a run folder (its newest EMA weights)"
    )
    command.add_argument("--out", required=True, help="folder for the images, or a .npz file in ADM's format")
    command.add_argument("--num", type=_positive, default=16, help="images to draw (default 16)")
    command.add_argument("--classes", help="labels, as 207,360; default: all of the model's classes in equal shares")
    command.add_argument("--seed", type=int, default=0, help="sample i depends on the seed and i only (default 0)")
    command.add_argument("--steps", type=_positive, help="network evaluations a sample; default: the config's")
    command.add_argument(
        "--cfg-scale", type=float, help="guidance in diffusers' convention, 1 + s; 1: none; default: the config's"
    )
    command.add_argument("--batch", type=_positive, default=50, help="images at a time (default 50)")
    command.add_argument("--resume", action="store_true", help="continue an interrupted job with the same settings")

    command = _add(commands, "demo", demo, "sample the digits run, and measure whether the samples are good")
    command.add_argument("--run-dir", default="runs/digits", help="the run's folder (default runs/digits)")

    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (UserError, ImportError) as error:
        print(f"uvit-fast: {error}", file=sys.stderr)
        return 2


def _add(commands, name: str, run: Callable, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run)
    return command


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help="a YAML file, such as configs/h2_256.yaml")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as train.batch_size=512"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def info(args: argparse.Namespace) -> None:
    """Print what is installed and what would run."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import uvit_fast
    from uvit_fast.model import ops

    print(f"uvit-fast {uvit_fast.__version__}, Python {sys.version.split()[0]}")
    for package in ("torch", "triton", "deepspeed", "diffusers", "transformers", "flash-attn", "xformers"):
        try:
            print(f"  {package:14s}{version(package)}")
        except PackageNotFoundError:
            print(f"  {package:14s}not installed")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, gpu in enumerate(gpus):
        print(f"  cuda:{i}        {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not gpus:
        print(f"  cpu           {torch.get_num_threads()} threads; no CUDA device")

    device = "cuda" if gpus else "cpu"
    names = [args.config] if args.config else sorted(map(str, Path("configs").glob("*.yaml")))
    shapes = {}  # (D, heads) -> the configs that have it
    for name in names:
        model = load_config(name).model
        shapes.setdefault((model.embed_dim, model.num_heads), []).append(Path(name).stem)
    for (dim, heads), configs in sorted(shapes.items()):
        print(f"\nD = {dim}, {heads} heads of {dim // heads} ({', '.join(configs)}) on {device}")
        for op, choice in ops.describe(dim, heads, "auto", "auto", device).items():
            print(f"  {op:16s}{choice}")


def sample(args: argparse.Namespace) -> None:
    """Draw images; write PNGs and a grid into a folder, or an .npz."""
    import numpy as np

    from uvit_fast import jobs, sampling
    from uvit_fast.diffusion.cudagraph import GraphSampler
    from uvit_fast.images import save_grid, to_uint8

    cfg = load_config(args.config, args.set)
    if cfg.model.context_dim:
        raise UserError(f"sample: {cfg.name} takes text features, which this command cannot make; use the Python API")
    scale = None if args.cfg_scale is None else args.cfg_scale - 1  # the paper's s
    if scale is not None and scale < 0:
        raise UserError(f"--cfg-scale: expected at least 1 (no guidance), got {args.cfg_scale}")
    device = sampling.pick_device(cfg.device)
    labels = None
    if cfg.model.num_classes:
        every = range(cfg.model.num_classes - (cfg.null_label is not None))
        classes = sampling.check_labels(_numbers(args.classes) if args.classes else list(every), cfg)
        labels = sampling.spread_labels(args.num, classes)
    elif args.classes:
        sampling.check_labels(_numbers(args.classes), cfg)
    model = sampling.load_for_sampling(cfg, args.checkpoint, device)
    decode = sampling.load_decoder(cfg, device) if cfg.latent else None

    options = {"steps": args.steps, "guidance_scale": scale, "seed": args.seed, "labels": labels}
    graphs = GraphSampler(model, decode) if device.type == "cuda" else None
    decode = decode if decode and not graphs else lambda x: x

    def draw(first: int, last: int) -> np.ndarray:
        batches = sampling.sample(model, cfg, last, first=first, batch=args.batch, graphs=graphs, **options)
        return np.concatenate([to_uint8(decode(x)) for x in batches])

    out = Path(args.out)
    settings = {
        name: getattr(args, name)
        for name in ("config", "set", "checkpoint", "num", "classes", "seed", "steps", "cfg_scale")
    }
    job = jobs.Job(out.with_name(out.name + ".parts"), settings, args.num, args.batch, resume=args.resume)
    images = job.run(draw)
    if images is None:  # another rank writes
        return
    names = None if labels is None else labels.numpy()
    if out.suffix == ".npz":
        sampling.save_npz(out, images, names)
    else:
        sampling.save_pngs(out, images, names)
        save_grid(images[:100], out / "grid.png", columns=min(10, args.num))
    job.close()
    print(f"wrote {args.num} images to {out}")


def demo(args: argparse.Namespace) -> int:
    """Sample and measure the digits; see uvit_fast/demo.py."""
    from uvit_fast.demo import run

    return run(Path(args.run_dir))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes: expected whole numbers with commas, such as 207,360, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
