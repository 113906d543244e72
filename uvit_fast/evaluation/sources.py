"""Where images come from: files of a folder, ADM's .npz, or any stream; all are read a batch at a time."""

import contextlib
import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from uvit_fast.runtime.ahead import ahead
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.progress import Bar

LARGEST = 4 << 30  # bytes of an array that is read whole: the features of 500,000 images
PROBED = 200  # files of a folder whose compression is checked
BROKEN = (
    OSError,
    KeyError,
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)  # what a bad .npz raises


@dataclass
class Images:
    """Images that can be read in order, any number of times.

    Args:
        name: for messages.
        count: how many there are.
        read: ranges of indices, ascending -> for each an array (B, H, W, 1 or 3) uint8.
        identity: called when needed; changes whenever the pixels do; None: never cached.
        lossy: share of them stored at this size with loss, as JPEG does.
        warnings: what the user should know about them, such as files that are not images.
    """

    name: str
    count: int
    read: Callable[[list[range]], Iterator[np.ndarray]]
    identity: Callable[[], str] | None = None
    lossy: float = 0.0
    warnings: list[str] = field(default_factory=list)


def open_files(name: str, folder: Path, files: list[str], read_file: Callable[[Path], np.ndarray]) -> Images:
    """Return images of one size from files.

    Args:
        name: for messages. files: their names below `folder`, in the images' order.
        read_file: returns (H, W, 3) uint8 for one file, or raises a UserError.
    """

    def read(parts: list[range]) -> Iterator[np.ndarray]:
        first = read_file(folder / files[0]).shape
        rows = (i for part in parts for i in part)
        arrays = ahead(lambda i: read_file(folder / files[i]), rows)
        for part in parts:
            images = list(islice(arrays, len(part)))
            for i, image in zip(part, images):
                if image.shape != first:
                    raise UserError(
                        f"{folder / files[i]}: expected {first[1]} x {first[0]} pixels as in the folder's first image, "
                        f"got {image.shape[1]} x {image.shape[0]}"
                    )
            yield np.stack(images)

    paths = [folder / name for name in files]
    return Images(name, len(files), read, lambda: hash_of(paths), lossy_share(paths))


def hash_of(paths: Iterable[Path], progress: bool = True) -> str:
    """Return the SHA-256 of the files' contents, in order; names, places and times do not count."""
    paths, whole = list(paths), hashlib.sha256()

    def one(path: Path) -> bytes:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    what, total = "looking for changed images", len(paths)
    for digest in Bar(ahead(one, paths), what=what, unit="images", total=total, delay=2, quiet=not progress):
        whole.update(digest)
    return whole.hexdigest()


def lossy_share(paths: list[Path], size: int | None = None) -> float:
    """Return the share of files that are compressed with loss, estimated on evenly spaced ones.

    Args:
        size: to which the images are reduced; larger ones do not count, since their losses average out.
    """
    some = paths[:: -(-len(paths) // PROBED)]
    return sum(_is_lossy(path, size) for path in some) / len(some)


def _is_lossy(path: Path, size: int | None) -> bool:
    """Detect JPEG, also within TIFF, GIF's few colours, AVIF, JPEG 2000 with the irreversible wavelet, and WebP without
    its lossless chunk.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
        with Image.open(path) as image:
            if size is not None and min(image.size) > size:
                return False
            if image.format == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
                return True
            if image.format == "JPEG2000":  # the last byte of its coding style (COD): 0 for the wavelet that rounds
                return head[head.index(b"\xff\x52") + 13] == 0
    except Exception:  # whoever reads the pixels reports what is wrong with them
        return False
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return head[:3] in (b"\xff\xd8\xff", b"GIF") or head[4:12] == b"ftypavif" or (webp and b"VP8L" not in head)


def open_npz(path: Path) -> Images:
    """Open ADM's samples: `arr_0`, uint8 (N, H, W, 3). Other arrays, such as its labels, are not read.

    Raises:
        UserError: another kind of file or array.
    """
    with _array(path, "arr_0") as (_, shape, dtype, size):
        if len(shape) != 4 or shape[-1] not in (1, 3) or dtype != np.uint8 or min(shape) < 0:
            nan = "; floating images are scaled differently by everyone" if dtype.kind == "f" else ""
            raise UserError(f"{path}: arr_0: expected uint8 (N, H, W, 3), got {dtype} {shape}{nan}")
        if math.prod(shape) == 0:
            raise UserError(f"{path}: arr_0: expected images, got none: {shape}")
        if size != math.prod(shape):
            raise UserError(f"{path}: arr_0: expected {math.prod(shape):,} bytes of {shape}, got {size:,}: truncated")

    def read(parts: list[range]) -> Iterator[np.ndarray]:
        image = math.prod(shape[1:])  # bytes
        with _array(path, "arr_0") as (file, *_):
            begin = file.tell()
            for part in parts:
                file.seek(begin + part.start * image)
                data = file.read(len(part) * image)
                if len(data) < len(part) * image:
                    raise UserError(f"{path}: arr_0: the file ends before image {part.stop} of {shape[0]}")
                yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])

    return Images(str(path), shape[0], read, lambda: hash_of([path]))


def names_in(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz.

    Raises:
        UserError: no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except BROKEN as error:
        raise UserError(f"{path}: no readable .npz ({_reason(error)})") from None


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return those of the arrays that an .npz has, whole.

    Raises:
        UserError: a broken file, one that would have to be unpickled, which can run anything, or one too large for
            memory.
    """
    arrays = {}
    for name in sorted(names_in(path) & set(names)):
        try:
            with zipfile.ZipFile(path) as archive:
                size = archive.getinfo(f"{name}.npy").file_size
            if size > LARGEST:
                raise UserError(f"{path}: {name}: expected at most {LARGEST:,} bytes, got {size:,}")
            with np.load(path, allow_pickle=False) as archive:
                arrays[name] = archive[name]
        except UserError:
            raise
        except (*BROKEN, MemoryError) as error:  # the latter for a header that claims more than there is
            raise UserError(f"{path}: {name}: not readable as an array of numbers ({_reason(error)})") from None
    return arrays


@contextlib.contextmanager
def _array(path: Path, name: str):
    """Return an array of an .npz as (file at its first byte, shape, dtype, bytes left): np.load would read it all."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            old = version == (1, 0)
            shape, fortran, dtype = (
                np.lib.format.read_array_header_1_0(file) if old else np.lib.format.read_array_header_2_0(file)
            )
            if fortran:
                raise UserError(f"{path}: {name}: expected C order, got Fortran order")
            yield file, shape, dtype, archive.getinfo(f"{name}.npy").file_size - file.tell()
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{path}: no readable .npz with {name} ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
