"""Draw what several runs logged while training, in one picture."""

import itertools
import math
import os
from pathlib import Path
from typing import Any

from uvit_fast.commands.drawing import COLOURS, pyplot, save
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import read_rows

SMOOTH = 0.02  # share of a run's rows over which a point of the thick loss curve averages
LABELS = {
    "loss": "training loss",
    "images_per_second": "images/s",
    "held_out_loss": "held-out loss",
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "kid": "KID",
}
Curve = tuple[list[float], list[float]]  # steps, values


def draw(runs: list[Path], path: Path) -> None:
    """Draw the runs' losses, images/s, and each figure of their evaluations, against their steps.

    Args:
        runs: folders of runs; those without rows are left out of the picture.
        path: its suffix chooses the format.

    Raises:
        UserError: no run has any rows, or `path` cannot be written. ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    names = _names(runs)
    curves = {name: _curves(run) for name, run in zip(names, runs)}
    curves = {name: of for name, of in curves.items() if of}
    if not curves:
        raise UserError(f"{', '.join(map(str, runs[:3]))}: no metrics.jsonl with rows; nothing to draw yet")
    found = dict.fromkeys(itertools.chain(*curves.values()))
    panels: list[str] = [name for name in ("loss", "images_per_second") if name in found]
    panels += sorted((name for name in found if name not in panels), key=lambda name: (name != "held_out_loss", name))
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.8 * columns, 2.9 * rows + 0.3), layout="constrained", squeeze=False, sharex=True
    )
    styles = [(colour, dashes) for dashes in ("-", "--", ":", "-.") for colour in COLOURS]
    for panel, ax in itertools.zip_longest(panels, axes.flat):
        if panel is None:
            ax.remove()
            continue
        for (name, of), style in zip(curves.items(), itertools.cycle(styles)):
            if panel in of:
                _line(ax, panel, *of[panel], name, style)
        ax.set_title(LABELS.get(panel, panel.replace("_", " ")), fontsize=9)
        ax.set_xlabel("optimizer steps")
        ax.tick_params(labelbottom=True)
        ax.grid(axis="y")
        if panel == "images_per_second":
            ax.set_ylim(bottom=0)
        elif panel == "loss" and any(max(line.get_ydata(), default=0) > 0 for line in ax.get_lines()):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:.3g}")
            ax.yaxis.set_minor_formatter("{x:.3g}")
            ax.tick_params(axis="y", which="minor", labelsize=7)
    handles = [
        plt.Line2D([], [], color=colour, linestyle=dashes)
        for _, (colour, dashes) in zip(curves, itertools.cycle(styles))
    ]
    figure.legend(handles, list(curves), loc="outside upper left", ncols=min(4, len(curves)), frameon=False)
    try:
        save(figure, path)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from None


def _line(ax: Any, panel: str, steps: list[float], values: list[float], name: str, style: tuple[str, str]) -> None:
    colour, dashes = style
    if panel not in ("loss", "images_per_second"):  # evaluations, which are few
        ax.plot(steps, values, "o", color=colour, linestyle=dashes, markersize=3)
        return
    window = max(1, round(SMOOTH * len(values)))
    if panel == "loss" and window > 1:
        ax.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
        values = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
        steps = steps[window - 1 :]
    ax.plot(steps, values, color=colour, linestyle=dashes, linewidth=1.3)


def _curves(run: Path) -> dict[str, Curve]:
    """Return every finite figure of a run's rows and evaluations, by name."""
    curves: dict[str, Curve] = {}
    training, evaluations = (read_rows(run / f"{name}.jsonl") for name in ("metrics", "evaluation"))
    training = [{name: row.get(name) for name in ("step", "loss", "images_per_second")} for row in training]
    for row in [*training, *evaluations]:
        for name, value in row.items():
            if name != "step" and all(
                isinstance(x, int | float) and math.isfinite(x) for x in (row.get("step"), value)
            ):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _names(runs: list[Path]) -> list[str]:
    """Return the folders' names; if two are equal, their paths from the folder that contains all."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [str(run.resolve()) for run in runs]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
