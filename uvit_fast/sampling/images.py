"""Sampled tensors as pictures, with text of any script beside them."""

import contextlib
import math
import unicodedata
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from uvit_fast.runtime.files import write_whole

LINE = 14  # height of a line of text, in pixels
FONTS = [  # of Linux, macOS and Windows; the first with a character draws it; Pillow's own has little beyond ASCII
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc",
    "arial.ttf", "msyh.ttc", "meiryo.ttc", "malgun.ttf", "Nirmala.ttf",
]  # fmt: skip


def to_uint8(x: Tensor) -> np.ndarray:
    """Convert (N, C, H, W) in [-1, 1], on any device, to (N, H, W, C) uint8; values outside are clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def as_picture(image: np.ndarray) -> Image.Image:
    """Return an image (H, W, C) uint8 as a picture, grey if C is 1."""
    return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    write_whole(path, lambda file: picture.save(file, format="PNG"))


def save_grid(
    images: np.ndarray,
    path: str | Path,
    columns: int,
    row_labels: list[str] | None = None,
    captions: list[str] | None = None,
) -> None:
    """Write images (N, H, W, C) uint8 as one PNG, `columns` per row, small ones enlarged.

    Args:
        row_labels: a short text to the left of each row.
        captions: a text below each image, cut to its width.
    """
    n, height, width, _ = images.shape
    scale, gap = max(1, round(48 / max(height, width))), 4
    height, w, below = height * scale, width * scale, LINE if captions else 0
    h = height + below
    left = 4 + max(text_picture(text).width for text in row_labels) if row_labels else 0
    rows = -(-n // columns)
    sheet = Image.new("RGB", (left + columns * (w + gap) + gap, rows * (h + gap) + gap), "white")
    for i, image in enumerate(images):
        tile = as_picture(image).resize((w, height), Image.Resampling.NEAREST)
        corner = left + gap + i % columns * (w + gap), gap + i // columns * (h + gap)
        sheet.paste(tile.convert("RGB"), corner)
        if captions:
            sheet.paste(text_picture(captions[i], w), (corner[0], corner[1] + height))
    for row, text in enumerate(row_labels or []):
        sheet.paste(text_picture(text), (4, gap + row * (h + gap) + (h - LINE) // 2))
    save_png(sheet, Path(path))


@lru_cache(4096)
def text_picture(text: str, most: int | None = None) -> Image.Image:
    """Draw a line of text, black on white, (width, LINE) pixels; a character that no font has becomes its code point in
    a box.

    Args:
        most: maximum width; a longer text is cut and ends in three dots.
    """
    text = unicodedata.normalize("NFC", text)
    picture = _line(text)
    cut = len(text)
    while most is not None and picture.width > most and cut > 0:
        cut = min(cut - 1, cut * most // picture.width + 1)
        picture = _line(text[:cut].rstrip() + "...")
    return picture if most is None else picture.crop((0, 0, min(most, picture.width), LINE))


def _line(text: str) -> Image.Image:
    """Draw the whole text, however long: (width, LINE) pixels."""
    pieces: list[tuple[str, ImageFont.FreeTypeFont | None]] = []
    every = [_fonts_with(character) for character in text]
    common = [font for font in every[0] if all(font in fonts for fonts in every)] if every else []  # looks better
    for character, fonts in zip(text, every):
        before = pieces[-1][1] if pieces else None
        mark = unicodedata.category(character)[0] == "M" and before in fonts  # stands on the letter before it
        font = before if mark else next(iter(common or fonts), None)
        if font and before is font:
            pieces[-1] = (pieces[-1][0] + character, font)
        else:
            pieces.append((character, font))
    widths = [math.ceil(font.getlength(piece)) if font else _code_point(piece).width for piece, font in pieces]
    picture = Image.new("RGB", (sum(widths) + 2, LINE), "white")
    for (piece, font), x in zip(pieces, accumulate(widths, initial=0)):
        if font:
            ImageDraw.Draw(picture).text((x, LINE - 4), piece, "black", font, anchor="ls")
        else:
            picture.paste(_code_point(piece), (x, 0))
    return picture


def _code_point(character: str) -> Image.Image:
    """Draw the substitute for a character that no font has: its hexadecimal code point, on two lines in a box."""
    digits, font = f"{ord(character):04X}", ImageFont.load_default(7)
    digits = digits.zfill(len(digits) + len(digits) % 2)
    half = len(digits) // 2
    picture = Image.new("RGB", (5 * half + 4, LINE), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 5 * half + 2, LINE - 1), outline="gray")
    for i, digit in enumerate(digits):
        draw.text((2 + i % half * 5, 6 + i // half * 6), digit, "black", font, anchor="ls")
    return picture


@lru_cache(4096)
def _fonts_with(character: str) -> list[ImageFont.FreeTypeFont]:
    """Return the fonts that have a character; none has one that does not print."""
    if not character.isprintable():
        return []
    missing = ["\U0010ffff", "\u25cc\U0010ffff"]  # Pillow 12 shapes here too: a mark alone stands on a dotted circle
    return [font for font in _fonts() if _drawn(font, character) not in [_drawn(font, each) for each in missing]]


@cache
def _fonts() -> list[ImageFont.FreeTypeFont]:
    """Return Pillow's own font and those of FONTS that are installed."""
    found = [cast(ImageFont.FreeTypeFont, ImageFont.load_default(10))]  # with a size, it is one
    for name in FONTS:
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, 10))
    return found


@lru_cache(4096)
def _drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple:
    mask = font.font_variant(layout_engine=ImageFont.Layout.BASIC).getmask(character)  # the glyph alone
    return mask.size, bytes(mask)
