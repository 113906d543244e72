"""`uvit-fast info`: versions, devices, and which kernels and attention would run, and why."""

import argparse
import sys
from pathlib import Path

from uvit_fast.config import CONFIGS, ModelConfig, config_names, load_config

HELP = "versions, devices, and which kernels would run, and why"
EXAMPLE = "uvit-fast info --config h2_256"


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("config")
    group.add_argument("--config", metavar="NAME", help="report for its model only; default: for all configs")


def run(args: argparse.Namespace) -> None:
    """Print what is installed and which kernels would run."""
    names = [args.config] if args.config else config_names()
    configs = {name: load_config(name).model for name in names}
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
    print(f"  {'configs':14s}{CONFIGS}")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, gpu in enumerate(gpus):
        print(f"  cuda:{i}        {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not gpus:
        print(f"  cpu           {torch.get_num_threads()} threads; no CUDA device")

    device = "cuda" if gpus else "cpu"
    shapes: dict[tuple[int, int], list[str]] = {}  # (D, heads) -> the configs with that shape
    for name, model in configs.items():
        if isinstance(model, ModelConfig):  # U-Nets have other ops
            shapes.setdefault((model.embed_dim, model.num_heads), []).append(Path(name).stem)
    for (dim, heads), names in sorted(shapes.items()):
        print(f"\nD = {dim}, {heads} heads of {dim // heads} ({', '.join(names)}) on {device}")
        for op, choice in ops.describe(dim, heads, "auto", "auto", device).items():
            print(f"  {op:20s}{choice}")
