"""`uvit-fast bench`: run the benchmark suite on this machine and write its report."""

import argparse
from pathlib import Path

from uvit_fast.runtime.errors import UserError

HELP = "run the benchmark suite here and write its report"
EXAMPLE = "uvit-fast bench --quick --only sampling,memory --out measured"


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what is measured")
    group.add_argument("--quick", action="store_true", help="fewer sizes and peers: an H100 takes seven minutes")
    group.add_argument("--only", default="", metavar="LIST", help="comma-separated names, such as sampling,memory")
    group = command.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="of rows (.csv), REPORT.md and plots/; without it they "
        "replace the repository's own, as its developers want")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run benchmarks/suite.py of the source tree, which is not part of the installed package."""
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "suite.py").is_file():
        raise UserError(f"bench: expected the source tree around {root}, with benchmarks/; clone the repository")
    command = [sys.executable, "-m", "benchmarks.suite", "--only", args.only]
    command += ["--quick"] if args.quick else []
    command += ["--out", str(args.out.resolve())] if args.out else []
    return subprocess.run(command, cwd=root).returncode
