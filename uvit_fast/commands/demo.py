"""`uvit-fast demo`: sample the digits run, and measure whether the samples are good."""

import argparse
from pathlib import Path

from uvit_fast.commands.arguments import existing

HELP = "sample the digits run, and measure whether the samples are good"
EXAMPLE = "uvit-fast demo --run-dir runs/digits"


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("run")
    group.add_argument("--run-dir", default="runs/digits", metavar="DIR", help="its folder (default runs/digits)")


def run(args: argparse.Namespace) -> int:
    """Sample and measure the digits; see uvit_fast/demo.py."""
    existing("--run-dir", args.run_dir, "the folder that `uvit-fast train --config digits` writes")
    from uvit_fast import demo

    return demo.run(Path(args.run_dir))
