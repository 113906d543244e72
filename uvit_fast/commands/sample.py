"""`uvit-fast sample`: draw images from a checkpoint."""

import argparse
from pathlib import Path

from uvit_fast.commands.arguments import config_arguments, numbers, positive
from uvit_fast.config import UserError, load_config

HELP = "draw images from a checkpoint"


def arguments(command: argparse.ArgumentParser) -> None:
    config_arguments(command)
    command.add_argument(
        "--checkpoint", required=True, help=".pth, .safetensors, or a run folder (its newest EMA weights)"
    )
    command.add_argument("--out", required=True, help="folder for the images, or a .npz file in ADM's format")
    command.add_argument("--num", type=positive, default=16, help="images to draw (default 16)")
    command.add_argument("--classes", help="labels, as 207,360; default: all of the model's classes in equal shares")
    command.add_argument("--seed", type=int, default=0, help="sample i depends on the seed and i only (default 0)")
    command.add_argument("--steps", type=positive, help="network evaluations a sample; default: the config's")
    command.add_argument(
        "--cfg-scale", type=float, help="guidance in diffusers' convention, 1 + s; 1: none; default: the config's"
    )
    command.add_argument("--batch", type=positive, default=50, help="images at a time (default 50)")
    command.add_argument("--resume", action="store_true", help="continue an interrupted job with the same settings")


def run(args: argparse.Namespace) -> None:
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
        classes = sampling.check_labels(numbers(args.classes) if args.classes else list(every), cfg)
        labels = sampling.spread_labels(args.num, classes)
    elif args.classes:
        sampling.check_labels(numbers(args.classes), cfg)
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
