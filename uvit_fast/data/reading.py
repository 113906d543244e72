"""One image file as 8-bit RGB, upright, or the reason why it cannot be; and the images of a folder."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from uvit_fast.config import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_WIDE = {"I", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow's modes of grey with more than 8 bits


class BadImage(Exception):
    """An image that cannot be read; the message is the reason."""


def read_image(file: Path) -> tuple[Image.Image, list[str]]:
    """The image as RGB, and what it took to make it so: of "greyscale", "CMYK", "16-bit", "EXIF-rotated".

    Raises:
        BadImage: zero bytes, truncated, or not readable for another reason.
    """
    try:
        if file.stat().st_size == 0:
            raise BadImage("zero bytes")
        with Image.open(file) as image:
            stored = str([tile.args for tile in image.tile])  # gone once the pixels are loaded
            image.load()
            oddities = []
            if image.getexif().get(ORIENTATION, 1) != 1:
                oddities.append("EXIF-rotated")
                image = ImageOps.exif_transpose(image)
            if image.mode in _WIDE or ";16" in stored:
                oddities.append("16-bit")
            if image.mode in {"1", "L", "LA", *_WIDE}:
                oddities.append("greyscale")
            if image.mode == "CMYK":
                oddities.append("CMYK")
            if image.mode in _WIDE:
                image = _eight_bits(image)
            return image.convert("RGB"), oddities
    except Image.UnidentifiedImageError:
        raise BadImage("unreadable: no known image format") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise BadImage(reason if "truncated" in reason else f"unreadable: {reason}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("expected grey of at most 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # Pillow's convert would clip, not scale


@dataclass(frozen=True)
class Listing:
    """The images below a folder, in the order of their names.

    Attributes:
        folder: theirs. files: paths below it, POSIX style. labels: one an image, or None. classes: names of the labels.
        ignored: other files below the folder, which no one reads.
    """

    folder: Path
    files: list[str]
    labels: list[int] | None
    classes: list[str]
    ignored: list[str]


def list_images(folder: Path, labelled: bool) -> Listing:
    """Find the images below `folder`: one folder a class where `labelled`, classes numbered in the order of their names.

    Raises:
        UserError: no images, a folder that cannot be listed, or, where `labelled`, images that lie in no class's folder.
    """
    found = [
        (os.path.relpath(directory, folder) + "/" + name).removeprefix("./")
        for directory, _, names in os.walk(
            folder, onerror=_refuse
        )  # millions of strings are light; of Path objects they would not be
        for name in names
    ]
    found.sort(key=lambda name: name.split("/"))
    is_image = [os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in found]
    images = [name for name, yes in zip(found, is_image) if yes]
    if not images:
        raise UserError(f"{folder}: no images; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    if labelled and any("/" not in name for name in images):
        raise UserError(f"{folder}: expected one folder a class, got images that lie in none")
    owners = [name.split("/", 1)[0] for name in images] if labelled else []
    classes = sorted(set(owners))
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[owner] for owner in owners] if labelled else None
    return Listing(folder, images, labels, classes, [name for name, yes in zip(found, is_image) if not yes])


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); its images would be lost")
