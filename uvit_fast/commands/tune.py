"""`uvit-fast tune`: measure the kernels' choices on this GPU and write its architecture's tuning table."""

import argparse
import os
import time
from pathlib import Path

from uvit_fast.commands.arguments import positive
from uvit_fast.runtime.errors import UserError

HELP = "measure this GPU's tuning table for the kernels"
EXAMPLE = "uvit-fast tune --dims 1152"


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what is measured")
    group.add_argument(
        "--dims",
        type=positive,
        nargs="+",
        default=[512, 768, 1024, 1152],
        metavar="D",
        help="widths (default: the paper's)",
    )
    group.add_argument("--cases", nargs="+", metavar="NAME", help="kernels, as prepare weight_gradient (default: all)")
    group = command.add_argument_group("output")
    group.add_argument("--out", metavar="FILE", help="the table (default: the installed one, sm_<arch>.json)")


def run(args: argparse.Namespace) -> None:
    """Tune the kernels. Deterministic kernels stay deterministic; only speed changes."""
    wrong = [dim for dim in args.dims if dim % 64]
    if wrong:
        raise UserError(f"--dims: expected multiples of 64, got {wrong[0]}")

    import torch

    from uvit_fast.kernels.runtime import tuning
    from uvit_fast.kernels.runtime.device import architecture
    from uvit_fast.kernels.tools import tune
    from uvit_fast.runtime.device import pick_device

    if not torch.cuda.is_available():
        raise UserError("tune: expected a GPU, got none")
    device = pick_device("cuda")
    known = tune.candidates(architecture(device))
    if unknown := [case for case in args.cases or () if case not in known]:
        raise UserError(f"--cases: expected some of {', '.join(known)}, got {unknown[0]}")
    out = Path(args.out or tuning.path(architecture(device)))
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(place, os.W_OK):  # better asked before the measuring than after
        raise UserError(f"--out {out}: expected a file in a folder that can be written to")
    tried = {case: len(choices) for case, choices in known.items() if not args.cases or case in args.cases}
    print(f"{sum(tried.values())} choices at each of {len(args.dims)} widths; the table goes to {out}", flush=True)
    began, widths = time.monotonic(), 0

    def width_done(D: int) -> None:
        nonlocal widths
        widths += 1
        passed = time.monotonic() - began
        left = passed / widths * (len(args.dims) - widths)
        print(f"D = {D}: {passed:.0f} s so far, about {left:.0f} s left", flush=True)

    tune.write(tune.tune(args.dims, device, only=args.cases, width_done=width_done), out)
    print(f"wrote {out}")
