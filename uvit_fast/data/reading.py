"""Read images: list those of a folder, and read each as upright, opaque 8-bit RGB, or say why that fails."""

import errno
import functools
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageFile, ImageOps

from uvit_fast.data import damage
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import printable

# The formats that Pillow decodes itself: not EPS, which it hands to Ghostscript, nor those that it only identifies.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi",),
    "DDS": (".dds",),
    "ICO": (".ico",),
    "PSD": (".psd",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# Folders that operating systems and storage servers add, in lower case; others of theirs begin with a dot.
SYSTEM_FOLDERS = frozenset(
    "__macosx __pycache__ @eadir @recently-snapshot @recycle @sharebin @tmp #recycle #snapshot ~snapshot "
    "$recycle.bin recycler "
    "lost+found".split()
) | {"system volume information"}

HIDDEN = "hidden, or the system's"
NO_IMAGE = "not an image by its ending"
DANGLING = "a link to nothing"

WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_WIDE = {"I", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow's modes of grey with more than 8 bits


class BadImage(Exception):
    """An image that cannot be read; the message is the reason."""


def read_image(file: Path, background: tuple[int, int, int] = WHITE) -> tuple[Image.Image, list[str]]:
    """Return the image as RGB, and what had to be converted.

    Of several frames, return the first. The `background`, 8-bit RGB, shows through transparent pixels.

    Returns:
        The image, and which of "EXIF-rotated", "16-bit", "greyscale", "CMYK", "transparent", "several frames" and
        "damaged (...)" it was.

    Raises:
        BadImage: zero bytes, truncated, or unreadable for another reason.
    """
    try:
        data = file.read_bytes()
        if not data:
            raise BadImage("zero bytes")
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return _as_rgb(image, data, background)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("unreadable: no known image format") from None
    except Exception as error:  # decoders raise exceptions of any kind on a damaged file
        reason = shown(" ".join(str(error).split())) or type(error).__name__
        raise BadImage(reason if "truncated" in reason else f"unreadable: {reason}") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF is not in every build


def _as_rgb(
    opened: ImageFile.ImageFile, data: bytes, background: tuple[int, int, int]
) -> tuple[Image.Image, list[str]]:
    stored = str([tile.args for tile in opened.tile])  # gone once the pixels are loaded, like a TIFF's orientation
    turned = is_turned(opened)
    oddities = ["several frames"] if getattr(opened, "is_animated", False) else []
    image, damaged = _loaded(opened, data)
    if damaged:
        oddities.append(f"damaged ({damaged})")
    if turned or is_turned(image):  # a PNG may say so after its pixels
        oddities.append("EXIF-rotated")
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise BadImage("floating point values; expected 8 or 16 bits")
    if image.mode in _WIDE or ";16" in stored:
        oddities.append("16-bit")
    if image.mode in {"1", "L", "LA", "La", *_WIDE}:
        oddities.append("greyscale")
    if image.mode == "CMYK":
        oddities.append("CMYK")
    if image.has_transparency_data:
        image = _with_alpha(image, stored)
        if cast(tuple[int, int], image.getchannel("A").getextrema())[0] < 255:
            oddities.append("transparent")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    elif image.mode in _WIDE:
        image = _eight_bits(image)
    return image.convert("RGB"), oddities


def _loaded(image: Image.Image, data: bytes) -> tuple[Image.Image, str]:
    """Return the image with its pixels, and libjpeg's objections to them."""
    if image.format not in ("JPEG", "MPO"):
        image.load()
        if reason := damage.lost(data, image):
            raise BadImage(f"truncated or damaged: {reason}")
        return image, ""
    info, mode = image.info, image.mode
    if damage.strict_jpeg() is None:
        image.load()
        return image, ""
    try:
        pixels = damage.decode_jpeg(data, mode)
    except ValueError as error:
        warning = str(error)
        if "premature end" in warning.lower():
            raise BadImage(f"truncated: {warning}") from None
        image.load()  # raises where the fault is more than a warning
        return image, warning if damage.is_readable_jpeg(data, mode) else ""
    if mode == "CMYK":  # Adobe stores inks inverted
        image.load()
        return image, ""
    image = Image.fromarray(pixels if mode == "RGB" else pixels[..., 0])
    image.info = info  # with the EXIF tags
    return image, ""


def is_turned(image: Image.Image) -> bool:
    """Return whether an EXIF tag says that the image must be turned or mirrored to be upright."""
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF says nothing about the pixels
        return False


def _with_alpha(image: Image.Image, stored: str) -> Image.Image:
    """Return the image as RGBA. A PNG may name one transparent colour, in the file's bits, not in Pillow's pixels."""
    named = image.info.get("transparency")
    if image.mode in _WIDE:
        alpha = Image.fromarray(np.where(np.asarray(image) == named, 0, 255).astype(np.uint8))
        image = _eight_bits(image).convert("RGB")
        image.putalpha(alpha)
    elif "RGB;16" in stored and named:
        image.info["transparency"] = tuple(value >> 8 for value in named)
    elif isinstance(named, int) and image.mode == "L":
        image.info["transparency"] = named * (85 if "L;2" in stored else 17 if "L;4" in stored else 1)
    return image.convert("RGBA")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("grey of more than 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # Pillow's convert would clip, not scale


@dataclass(frozen=True)
class Listing:
    """The images below a folder, in the order of their names.

    Attributes:
        folder: theirs. files: paths below it, POSIX style. labels: one per image, or None. classes: names of the
            labels.
        left_out: reason -> paths, below the folder, of what is ignored.
        twice: paths of folders that a link leads to again; their images count once for each path.
    """

    folder: Path
    files: list[str]
    labels: list[int] | None
    classes: list[str]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        """All that is left out, for whatever reason."""
        return in_order(path for paths in self.left_out.values() for path in paths)

    @property
    def counts(self) -> dict[str, int]:
        """Images per class; 0 for an empty class."""
        numbers = np.bincount(self.labels or [], minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, numbers))

    @property
    def notes(self) -> list[str]:
        """A sentence on each thing about the folder that a user may not expect."""
        notes = [f"left out {_some(paths)}: {why}" for why, paths in self.left_out.items()]
        if empty := [name for name, count in self.counts.items() if not count]:
            notes.append(f"classes without an image: {_some(empty)}; they keep their labels")
        if deeper := [name for name in self.files if self.classes and name.count("/") > 1]:
            notes.append(f"below the folders of the classes, and counted as theirs: {_some(deeper)}")
        if self.twice:
            notes.append(f"reached by more than one way, and read for each: {_some(self.twice)}")
        return notes


def list_images(folder: Path, labelled: bool) -> Listing:
    """Find the images below `folder`: one folder per class if `labelled`, classes numbered in the order of their names.

    Links are followed. An empty class folder counts, too, so that the labels behind it stay. Names with a leading dot
    and folders that systems add (`SYSTEM_FOLDERS`) are left out.

    Raises:
        UserError: no images, a folder that cannot be listed, a link to a folder that contains it, or, if `labelled`,
            images outside all class folders or a class folder that is a broken link.
    """
    files, classes, twice = [], [], []
    left_out: dict[str, list[str]] = {}

    def leave(why: str, path: str) -> None:
        left_out.setdefault(why, []).append(path)

    root = _identity(folder)
    seen = {root}
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [
        ("", (root,))
    ]  # folders still to list, with the folders through which they were reached
    while todo:
        below, chain = todo.pop()
        for entry in _entries(os.path.join(folder, below) if below else str(folder)):
            path = os.path.join(below, entry.name)  # a string: millions of Path objects would be heavy
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
                leave(HIDDEN, path)
            elif (kind := _kind(entry)) == "folder":
                identity = _identity(entry.path)
                if identity in chain:
                    raise UserError(
                        f"{shown(entry.path)}: leads back to a folder that contains it; expected no such link"
                    )
                if identity in seen:
                    twice.append(path)
                seen.add(identity)
                todo.append((path, (*chain, identity)))
                if not below:
                    classes.append(entry.name)
            elif kind != "other" and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                files.append(path)  # a broken link, too: an image that cannot be read
            elif kind == "nothing" and labelled and not below:
                raise UserError(f"{shown(entry.path)}: a link to nothing; expected the folder of a class")
            else:
                leave(DANGLING if kind == "nothing" else NO_IMAGE, path)

    files, left_out = in_order(files), {why: in_order(left_out[why]) for why in sorted(left_out)}
    if not files:
        usual = ", ".join(suffixes[0] for suffixes in FORMATS.values())
        found = "; ".join(f"{_some(paths)}: {why}" for why, paths in left_out.items()) or "nothing"
        raise UserError(f"{shown(str(folder))}: no images; expected files ending in {usual}; got {found}")
    if labelled and (loose := [path for path in files if "/" not in path]):
        raise UserError(
            f"{shown(str(folder))}: expected one folder per class, got images that lie in none: {_some(loose)}"
        )
    if not labelled:
        return Listing(folder, files, None, [], left_out, in_order(twice))
    number = {name: i for i, name in enumerate(sorted(classes))}
    labels = [number[path.split("/", 1)[0]] for path in files]
    return Listing(folder, files, labels, list(number), left_out, in_order(twice))


def in_order(paths: Iterable[str]) -> list[str]:
    """Sort paths folder by folder, so that "a/b" comes before "a-b"."""
    return sorted(paths, key=lambda path: path.split("/"))


def shown(name: str) -> str:
    """Return a file's name on one line for any terminal, with control characters and invalid UTF-8 escaped."""
    return printable(name)


def _some(paths: list[str]) -> str:
    """Say how many paths there are, with which endings, and the first of them."""
    if len(paths) <= 3:
        return ", ".join(map(shown, paths))
    endings = Counter(os.path.splitext(path)[1].lower() for path in paths).most_common(4)
    kinds = ", ".join(f"{count} {shown(ending)}" for ending, count in endings if ending)
    return f"{len(paths)}{f' ({kinds})' if kinds else ''}, such as {shown(paths[0])}"


def _entries(folder: str) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be listed ({error.strerror}); its images would be lost") from None


def _kind(entry: os.DirEntry) -> str:
    """Return "folder", "file", "nothing" for a broken link, or "other", such as pipes, on which a reader would hang."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "nothing" if entry.is_symlink() and not os.path.exists(entry) else "other"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "nothing"
        raise UserError(f"{shown(entry.path)}: cannot be listed ({error.strerror}); its images would be lost") from None


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return what all paths to a folder share."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino
