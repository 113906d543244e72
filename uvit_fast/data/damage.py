"""Damage that decoders do not report: files that lost their tail, or a part, and still decode as whole pictures, half
grey.
"""

import functools
import io
import struct
import warnings
import zlib
from types import ModuleType

import numpy as np
from PIL import Image

ZEROS = 32  # zero bytes at the end of the compressed pixels from which a closer look is worthwhile
_COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT"}


@functools.cache
def strict_jpeg() -> ModuleType | None:
    """Return libjpeg-turbo with its warnings, or None, said once, on a machine without it: the pixels are the same."""
    try:
        import simplejpeg
    except ImportError:
        warnings.warn("simplejpeg is not installed: JPEGs that lost a part are read as whole ones", stacklevel=4)
        return None
    return simplejpeg


def decode_jpeg(data: bytes, mode: str) -> np.ndarray:
    """Return the pixels of an intact JPEG, uint8 (H, W, C), identical to Pillow's.

    Args:
        mode: "RGB" or "L" as Pillow would read it, or "CMYK".

    Raises:
        ValueError: libjpeg's first warning, which Pillow does not pass on, or an error.
    """
    jpeg = strict_jpeg()
    assert jpeg is not None
    return jpeg.decode_jpeg(data, _COLOURS[mode])


def is_readable_jpeg(data: bytes, mode: str) -> bool:
    """Return whether `decode_jpeg` raised only warnings; otherwise Pillow may know more."""
    jpeg = strict_jpeg()
    assert jpeg is not None
    try:
        jpeg.decode_jpeg(data, _COLOURS[mode], strict=False)
    except ValueError:
        return False
    return True


def lost(data: bytes, image: Image.Image) -> str | None:
    """Return what a loaded image of another format than JPEG has lost without an error from its decoder, or None if
    nothing is detected.

    BMP, PPM and the like hold bare pixels: zeros are black there, and indistinguishable from the picture's own.
    """
    if image.format == "PNG":
        return _wrong_checksum(data)
    if image.format == "QOI":
        return None if bytes(7) + b"\1" in data[14:] else "no end marker"
    if image.format == "WEBP" and not getattr(image, "is_animated", False):
        end = _end(data, 12, "<4sI", (b"VP8 ", b"VP8L"))
    elif image.format == "AVIF" and not {"exif", "xmp"} & image.info.keys():  # these may come after the pixels
        end = _end(data, 0, ">I4s", (b"mdat",))
    else:
        return None
    return "its pixels end in zeros" if end and _unread(data, end, image) else None


def _wrong_checksum(data: bytes) -> str | None:
    """Return what is wrong with the checksums of a PNG's pixels, which Pillow does not verify, or None."""
    view, position = memoryview(data), 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if name in _PNG_PIXELS and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return f"wrong checksum of {name.decode()}"
        if name == b"IEND":
            return None
        position = end + 4
    return "no end"


def _end(data: bytes, position: int, header: str, names: tuple[bytes, ...]) -> int | None:
    """Return where the first of the chunks (of RIFF, whose length excludes the header) or boxes (of ISO media) with one
    of these names ends.
    """
    while position + 8 <= len(data):
        first, second = struct.unpack_from(header, data, position)
        name, length = (first, 8 + second) if isinstance(first, bytes) else (second, first)
        if name in names:
            return min(position + length, len(data)) if length else len(data)
        if length < 8:
            return None
        position += length + length % 2 * isinstance(first, bytes)  # chunks are padded to even lengths
    return None


def _unread(data: bytes, end: int, image: Image.Image) -> bool:
    """Return whether zeros before `end` do not affect the picture, which therefore ended before them: the rest was
    lost.

    A plain area at the bottom may be zeros too, but other bytes there would change it.
    """
    if any(data[end - ZEROS : end]):
        return False
    half = ZEROS // 2
    try:
        with Image.open(
            io.BytesIO(data[: end - half] + b"\xa5" * half + data[end:]), formats=[str(image.format)]
        ) as other:
            return other.tobytes() == image.tobytes()
    except Exception:  # whatever the decoder raises: it has read them
        return False
