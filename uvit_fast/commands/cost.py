"""`uvit-fast cost`: parameters and multiply-adds of the configs, beside the paper's (Appendix D)."""

import argparse
from functools import cache
from pathlib import Path

from uvit_fast.config import Config, config_names, load_config

HELP = "count parameters and GFLOPs of configs, beside the paper's"
EXAMPLE = "uvit-fast cost --config h2_256"
# Millions of parameters, and GFLOPs, where the paper counts one per multiply-add.
PAPER: dict[str, tuple[float, float | None]] = {
    "s2_cifar10": (44, None),
    "s4_celeba64": (44, None),
    "m4_64": (131, 35),
    "l4_64": (287, 77),
    "l2_256": (287, 77),
    "l4_512": (287, 77),
    "h2_256": (501, 133),
    "h4_512": (501, 133),
    "s2_coco": (45, None),
    "s2deep_coco": (58, None),
    "unet_ldm_coco": (53, None),
    "unet_adm_256": (646, 135),
}


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("config")
    group.add_argument("--config", nargs="+", metavar="NAME", help="some of the package, or YAML files; default: all")


def run(args: argparse.Namespace) -> None:
    """Print a table. Nothing is allocated: models are built on the meta device."""
    rows = [("config", "parameters", "M", "paper", "GFLOPs", "paper")]
    counted, left_out = [], {}
    configs = {Path(name).stem: load_config(name) for name in args.config or config_names()}
    for name, config in configs.items():
        try:
            parameters, macs = count(config)
        except ImportError as error:  # a U-Net, which needs diffusers
            if args.config:
                raise
            left_out[name] = error
            continue
        counted.append((macs, name, parameters))
    for macs, name, parameters in sorted(counted):
        published = ["–" if x is None else f"{x:g}" for x in PAPER.get(name, (None, None))]
        rows.append(
            (name, f"{parameters:,}", f"{parameters / 1e6:.1f}", published[0], f"{macs / 1e9:.1f}", published[1])
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    print(
        "GFLOPs: 10^9 multiply-adds of one forward pass of one image, as the paper counts; "
        "paper: Table 1 and appendix D"
    )
    for name, why in left_out.items():
        print(f"left out: {name} ({why})")


@cache
def count(config: Config) -> tuple[int, float]:
    """Return parameters, and multiply-adds of matrix products and convolutions in one forward pass of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from uvit_fast.build import build_model
    from uvit_fast.training.activations import example

    with torch.device("meta"):
        model = build_model(config)
    inputs, conditions = example(config.model, 1, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **conditions)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2
