"""`uvit-fast runs`: the training runs of a folder and their state."""

import argparse
import math
from pathlib import Path

from uvit_fast.commands.arguments import existing
from uvit_fast.runtime.errors import UserError

HELP = "the training runs of a folder and their state"
EXAMPLE = "uvit-fast runs runs"


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="of the runs (default runs)")


def run(args: argparse.Namespace) -> None:
    """Print a line a run, the one that changed last first."""
    existing("runs", str(args.folder), "a folder of runs that train.py made")
    from uvit_fast.training.folder import run_states

    found = run_states(args.folder)
    if not found:
        raise UserError(f"{args.folder}: no runs; expected folders that train.py made")
    rows = [("run", "state", "step", "loss", "images/s", "checkpoint", "commit", "changed")]
    for each in found:
        rows.append(
            (
                each.name,
                each.state,
                f"{each.step}/{each.steps}",
                "–" if each.loss is None else f"{each.loss:.4f}",
                "–" if each.images_per_second is None else f"{each.images_per_second:.0f}",
                "–" if each.checkpoint is None else str(each.checkpoint),
                "–" if each.commit is None else each.commit[:8] + "+" * each.commit.endswith("+"),
                "–" if each.changed == math.inf else f"{_ago(each.changed)} ago",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
