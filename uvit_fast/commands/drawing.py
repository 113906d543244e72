"""The common style of the commands' pictures."""

import warnings
from pathlib import Path
from typing import Any

from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.files import write_whole

INK, GRID = "#333333", "#dddddd"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]  # colour-blind safe (Okabe and Ito)


def pyplot() -> Any:
    """Return matplotlib.pyplot, set up to write files in the house style.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError:
        raise missing("a picture", "matplotlib", "plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"text.parse_math": False})  # a run may be called as it likes
    pyplot.rcParams.update({"font.size": 9, "axes.edgecolor": INK, "text.color": INK})
    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    pyplot.rcParams.update({"axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True})
    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of `path`'s suffix, whole or not at all, and close it.

    Raises:
        OSError: it cannot be written.
    """
    kind = path.suffix[1:].lower()
    about = {"metadata": {"Software": None}} if kind == "png" else {}  # so that equal pictures are equal files
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in another script: boxes
            write_whole(path, lambda file: figure.savefig(file, dpi=150, format=kind, **about))
    finally:
        pyplot().close(figure)
