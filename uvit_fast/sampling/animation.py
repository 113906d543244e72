"""Animate the sample grids of a run."""

import re
import warnings
from pathlib import Path

from PIL import Image

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole
from uvit_fast.sampling.images import LINE, text_picture

FRAMES = 120  # at most; of more grids, evenly spaced ones
SHOWN, HELD = 200, 2000  # milliseconds per grid, and for the last one


def save_animation(folder: Path, path: Path) -> int:
    """Write the grids of a run as an animation over its steps, labelled by step; return how many it shows.

    Args:
        folder: holds step_<step>.png, as training writes them.
        path: a .gif or .webp, which loops forever.

    Raises:
        UserError: there are none that can be read, or `path` cannot be written.
    """
    found = sorted(
        (int(file.stem[5:]), file) for file in folder.glob("step_*.png") if re.fullmatch(r"step_\d+", file.stem)
    )
    if not found:
        raise UserError(f"{folder}: no step_*.png; expected the grids that train.sample_every writes")
    most = min(FRAMES, len(found))
    chosen = [found[round(i * (len(found) - 1) / max(1, most - 1))] for i in range(most)]
    read = [(step, _read(file)) for step, file in chosen]
    grids = [(step, grid) for step, grid in read if grid]
    if not grids:
        raise UserError(f"{folder}: no step_*.png that can be read; expected the grids that training writes")
    size = tuple(max(grid.size[axis] for _, grid in grids) for axis in (0, 1))  # a continued run may change settings
    frames = []
    for step, grid in grids:
        frame = Image.new("RGB", (size[0], size[1] + LINE + 4), "white")
        frame.paste(text_picture(f"step {step:,}", size[0] - 4), (4, 4))
        frame.paste(grid, (0, LINE + 4))
        frames.append(frame)
    options = {"save_all": True, "append_images": frames[1:], "loop": 0}
    options["duration"] = [*[SHOWN] * (len(frames) - 1), HELD] if len(frames) > 1 else HELD
    try:
        write_whole(path, lambda file: frames[0].save(file, format=path.suffix[1:].upper(), **options))
    except OSError as error:
        raise UserError(f"--animate {path}: cannot be written ({error.strerror or error})") from None
    return len(frames)


def _read(file: Path) -> Image.Image | None:
    """None, and a warning, where it cannot be read: a run may have been killed as it wrote it."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # the latter is Pillow's, for a damaged PNG
        warnings.warn(f"{file}: left out, it cannot be read ({error})", stacklevel=3)
        return None
