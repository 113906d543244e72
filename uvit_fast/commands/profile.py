"""`uvit-fast profile`: a profiler's trace, and the time per family of ops, of training and of sampling."""

import argparse
import os
from pathlib import Path

from uvit_fast.commands.arguments import config_arguments, positive
from uvit_fast.config import load_config

HELP = "trace training and sampling, with the time by kind of op"
EXAMPLE = "uvit-fast profile --config digits --only training"


def arguments(command: argparse.ArgumentParser) -> None:
    config_arguments(command)
    group = command.add_argument_group("what is recorded")
    group.add_argument(
        "--only", choices=["training", "sampling"], metavar="WHAT", help="training or sampling; default: both"
    )
    group.add_argument(
        "--batch", type=positive, default=64, metavar="N", help="images per step, and to sample (default 64)"
    )
    group.add_argument("--steps", type=positive, default=3, metavar="N", help="training steps (default 3)")
    group = command.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="traces, tables (default runs/<name>/profile)")


def run(args: argparse.Namespace) -> None:
    """Profile on synthetic data and random weights; write <what>.json.gz, for ui.perfetto.dev, and <what>.csv."""
    load_config(args.config, args.set)  # before anything that takes seconds
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # hides its own progress
    from uvit_fast import profiling

    steps = profiling.WARM_UP + 1 + args.steps
    overrides = ["data.name=synthetic", f"train.batch_size={args.batch}", f"train.iterations={steps}"]
    cfg = load_config(args.config, [*args.set, *overrides, "train.log_every=1000000", "train.sample_every=0"])
    out = args.out or Path("runs") / cfg.name / "profile"
    out.mkdir(parents=True, exist_ok=True)
    jobs = {
        "training": ("a step", lambda trace: profiling.training(cfg, args.steps, trace)),
        "sampling": (f"{args.batch} samples", lambda trace: profiling.sampling(cfg, args.batch, trace)),
    }
    for what, (unit, job) in jobs.items():
        if args.only in (None, what):
            rows = job(out / f"{what}.json.gz")
            profiling.write(rows, out / f"{what}.csv")
            print(f"\n{what}, {cfg.name}, milliseconds {unit}, batch {args.batch}\n{profiling.table(rows)}")
    print(f"\nwrote {out}")
