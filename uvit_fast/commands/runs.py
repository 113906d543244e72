"""`uvit-fast runs`: training runs as a table, as curves, or as an animation of their samples."""

import argparse
import math
from pathlib import Path

from uvit_fast.commands.arguments import existing
from uvit_fast.runtime.errors import UserError

HELP = "list training runs; draw their curves, animate their samples"
EXAMPLE = "uvit-fast runs runs/digits runs/flow --plot curves.png"
PICTURES, ANIMATIONS = (".png", ".svg", ".pdf"), (".gif", ".webp")


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", nargs="*", default=["runs"], metavar="DIR", help="of runs, or a run (default runs)")
    group = command.add_argument_group("draw")
    group.add_argument(
        "--plot", nargs="?", const="", metavar="FILE", help="loss, images/s, evaluations (default <DIR>/runs.png)"
    )
    group.add_argument(
        "--animate", nargs="?", const="", metavar="FILE", help="a run's sample grids (default <DIR>/samples.gif)"
    )


def run(args: argparse.Namespace) -> None:
    """Print a line per run, the most recently changed first; or draw what the runs' folders hold."""
    folders = [Path(name) for name in args.folders]
    for folder in folders:
        existing("runs", str(folder), "a folder of runs, or a run, that `uvit-fast train` made")
    plot = _file("--plot", args.plot, folders[0] / "runs.png", PICTURES)
    animation = _file("--animate", args.animate, folders[0] / "samples.gif", ANIMATIONS)
    from uvit_fast.training.folder import find_runs

    found = find_runs(*folders)
    if not found:
        where = ", ".join(map(str, folders))
        raise UserError(f"{where}: no runs; expected folders that `uvit-fast train` made")
    if animation and len(found) > 1:
        some = ", ".join(map(str, found[:3])) + ", ..." * (len(found) > 3)
        raise UserError(f"--animate: expected one run, got {len(found)}: {some}")
    if not (plot or animation):
        print(_table(folders))
    if plot:
        from uvit_fast.commands.curves import draw

        draw(found, plot)
        print(f"wrote {plot}")
    if animation:
        from uvit_fast.sampling.animation import save_animation

        count = save_animation(found[0] / "samples", animation)
        print(f"wrote {count} grids of samples to {animation}")


def _file(option: str, given: str | None, default: Path, suffixes: tuple[str, ...]) -> Path | None:
    """Return the file that an option is to write, or None.

    Raises:
        UserError: a name that ends in none of `suffixes`.
    """
    if given is None:
        return None
    if given and Path(given).suffix.lower() not in suffixes:
        raise UserError(f"{option} {given}: expected a name that ends in {', '.join(suffixes)}; folders come before it")
    return Path(given) if given else default


def _table(folders: list[Path]) -> str:
    from uvit_fast.training.folder import run_states

    rows = [("run", "state", "step", "loss", "images/s", "checkpoint", "commit", "changed")]
    for each in run_states(*folders):
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
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
