"""Sampled tensors as pictures."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor


def to_uint8(x: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1], any device -> (N, H, W, C) uint8; values outside are clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(
    images: np.ndarray,
    path: str | Path,
    columns: int,
    row_labels: list[str] | None = None,
    captions: list[str] | None = None,
) -> None:
    """Write images (N, H, W, C) uint8 as one PNG, `columns` a row, scaled up so that a person sees small ones.

    Args:
        row_labels: a short text to the left of each row.
        captions: a text below each image, cut to its width.
    """
    n, height, width, c = images.shape
    scale, gap = max(1, round(48 / max(height, width))), 4
    height, w, below = height * scale, width * scale, 14 if captions else 0
    h = height + below
    left = 4 + 8 * max(map(len, row_labels)) if row_labels else 0
    rows = -(-n // columns)
    sheet = Image.new("RGB", (left + columns * (w + gap) + gap, rows * (h + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        tile = Image.fromarray(image if c == 3 else image[..., 0]).resize((w, height), Image.Resampling.NEAREST)
        corner = left + gap + i % columns * (w + gap), gap + i // columns * (h + gap)
        sheet.paste(tile.convert("RGB"), corner)
        if captions:
            text = captions[i][: w // 6].encode("ascii", "replace").decode()  # what Pillow's own font has
            draw.text((corner[0], corner[1] + height + 1), text, fill="black")
    for row, text in enumerate(row_labels or []):
        draw.text((4, gap + row * (h + gap) + h // 2 - 6), text, fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
