"""Images in, features and their moments out, a batch at a time: folders of PNG and JPEG, ADM's .npz, or any stream.

Memory grows with the number of images by their pool features alone (8 KB an image for Inception).
"""

import contextlib
import hashlib
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from uvit_fast.config import UserError
from uvit_fast.evaluation.inception import Features, Inception, preprocess
from uvit_fast.evaluation.metrics import Moments, RunningMoments
from uvit_fast.ranks import ALONE, Ranks

SUFFIXES = {".png", ".jpg", ".jpeg"}
READERS = 8  # threads that decode images
CONSTANT_SHARE = 0.01  # of images of one colour, beyond which there is a warning


class Extractor(Protocol):
    """What turns images into features."""

    prefix: str  # of the figures' names: "" for Inception's, "digits-" for the classifier's
    identity: str  # changes whenever the features would
    device: torch.device
    pool_dim: int

    def __call__(self, images: Tensor) -> Features:
        """(B, H, W, 3) uint8 on `device` -> features."""

    def probabilities(self, pool: Tensor) -> Tensor:
        """(B, D) pool features -> (B, K) class probabilities."""


class InceptionFeatures:
    """Pool3 and the spatial features of the 2015 Inception.

    Args:
        model, sha: as `load_inception` gives them.
        like: the preprocessing, see `inception.preprocess`.
    """

    prefix, pool_dim = "", 2048

    def __init__(self, model: Inception, sha: str, device: torch.device, like: str = "tensorflow"):
        self.model, self.device, self.like = model.to(device), device, like
        self.identity = f"inception-{sha[:16]}-{like}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        # TF32 would change the features in the fourth digit
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
            return self.model(preprocess(images, self.like))

    @torch.inference_mode()
    def probabilities(self, pool: Tensor) -> Tensor:
        return self.model.probabilities(pool)


@dataclass
class Images:
    """Images that can be read through from the start.

    Args:
        name: for messages.
        count: how many there are.
        read: ranges of indices, ascending -> of each its array (B, H, W, 1 or 3) uint8.
        identity: called when needed; changes whenever the images do; None: never cached.
        ordered_by_class: consecutive images share a class, which would spoil splits of consecutive images.
    """

    name: str
    count: int
    read: Callable[[list[range]], Iterator[np.ndarray]]
    identity: Callable[[], str] | None = None
    ordered_by_class: bool = False


def open_images(path: str | Path) -> Images:
    """A folder of images, at any depth, or an .npz with `arr_0` as ADM writes samples.

    Raises:
        UserError: nothing there, or something else.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npz":
        return _open_npz(path)
    raise UserError(f"{path}: no such images; expected a folder of PNG or JPEG files, or an .npz with arr_0")


def _open_folder(folder: Path) -> Images:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p != folder / "grid.png")
    if not files:  # grid.png is the overview that `uvit-fast sample` adds
        raise UserError(f"{folder}: no images; expected PNG or JPEG files")

    def open_image(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"{file}: not a readable image ({error})") from None

    def read(parts: list[range]) -> Iterator[np.ndarray]:
        first = open_image(files[0]).shape
        with ThreadPoolExecutor(READERS) as pool:
            waiting, rest = deque(), (files[i] for part in parts for i in part)
            for part in parts:
                while len(waiting) < len(part) + READERS and (file := next(rest, None)) is not None:
                    waiting.append((file, pool.submit(open_image, file)))
                images = []
                for file, future in [waiting.popleft() for _ in part]:
                    image = future.result()
                    if image.shape != first:
                        raise UserError(
                            f"{file}: expected {first[1]} x {first[0]} pixels as in the folder's first image, "
                            f"got {image.shape[1]} x {image.shape[0]}"
                        )
                    images.append(image)
                yield np.stack(images)

    def identity() -> str:
        digest = hashlib.sha256()
        for file in files:
            stat = file.stat()
            digest.update(f"{file.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    return Images(str(folder), len(files), read, identity, ordered_by_class=True)  # names often begin with the class


def _open_npz(path: Path) -> Images:
    with _array(path, "arr_0") as (_, shape, dtype):
        if len(shape) != 4 or shape[-1] not in (1, 3) or dtype != np.uint8:
            nan = "; floating images are scaled differently by everyone" if dtype.kind == "f" else ""
            raise UserError(f"{path}: arr_0: expected uint8 (N, H, W, 3), got {dtype} {shape}{nan}")
    if shape[0] == 0:
        raise UserError(f"{path}: arr_0: expected images, got none")

    def read(parts: list[range]) -> Iterator[np.ndarray]:
        image = int(np.prod(shape[1:]))  # bytes
        with _array(path, "arr_0") as (file, _, _):
            begin = file.tell()
            for part in parts:
                file.seek(begin + part.start * image)
                data = file.read(len(part) * image)
                if len(data) < len(part) * image:
                    raise UserError(f"{path}: arr_0: the file ends before image {part.stop} of {shape[0]}")
                yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])

    def identity() -> str:
        stat = path.stat()
        return hashlib.sha256(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()

    with np.load(path) as archive:
        labels = archive["arr_1"] if "arr_1" in archive else np.zeros(0)
    by_class = labels.ndim == 1 and len(np.unique(labels)) > 1 and bool((np.diff(labels) >= 0).all())
    return Images(str(path), shape[0], read, identity, ordered_by_class=by_class)


@contextlib.contextmanager
def _array(path: Path, name: str):
    """An array of an .npz as (file at its first byte, shape, dtype): np.load would read all of it."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[version](file)
            if fortran:
                raise UserError(f"{path}: {name}: expected C order, got Fortran order")
            yield file, shape, dtype
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no readable .npz with {name} ({error})") from None


@dataclass
class Extracted:
    """Of N images: moments of both features; pool (N, D) fp32 on the CPU; their (height, width); what was odd about them."""

    pool_moments: Moments
    spatial_moments: Moments
    pool: Tensor
    size: tuple[int, int]
    warnings: list[str]


def extract(
    images: Images, extractor: Extractor, batch: int = 50, progress: bool = True, ranks: Ranks = ALONE
) -> Extracted | None:
    """Features of all images, with progress and the time left on stderr.

    Args:
        ranks: they divide the batches; the features have the images' order whatever their number.

    Returns:
        on rank 0 what was found, on the others None.

    Raises:
        UserError: fewer than two images, images without any contrast, or features that are not finite.
    """
    if images.count < 2:
        raise UserError(f"{images.name}: expected at least 2 images, got {images.count}")
    parts = [range(start, min(start + batch, images.count)) for start in range(0, images.count, batch)]
    mine, share = ranks.share(parts), _Share()
    described = f"features of {images.name}"
    with tqdm(total=images.count, unit="image", desc=described, disable=not progress or ranks.rank > 0) as bar:
        for array in images.read(mine):
            share.add(array, extractor, images.name)
            bar.update(min(len(array) * ranks.count, images.count - bar.n))  # the others keep pace
            ranks.check()
    shares = ranks.gather(share.on_cpu() if ranks.count > 1 else share)
    return None if shares is None else _merged(shares, images)


class _Share:
    """What one process found, of the images that it read."""

    def __init__(self):
        self.pools: list[Tensor] = []
        self.moments: dict[str, RunningMoments] = {}
        self.size, self.constant = None, 0

    def add(self, array: np.ndarray, extractor: Extractor, name: str) -> None:
        self.size = array.shape[1:3]
        flat = array.reshape(len(array), -1, array.shape[-1])
        self.constant += int((flat == flat[:, :1]).all((1, 2)).sum())
        features = extractor(torch.from_numpy(_rgb(array)).to(extractor.device))
        for kind, x in features._asdict().items():
            if not torch.isfinite(x).all():
                raise UserError(f"{name}: {kind} features are NaN or infinite; no figure would mean anything")
            self.moments.setdefault(kind, RunningMoments(x.shape[1], extractor.device)).update(x)
        self.pools.append(features.pool.float().cpu())

    def on_cpu(self) -> "_Share":
        self.moments = {kind: running.to("cpu") for kind, running in self.moments.items()}
        return self


def _merged(shares: list[_Share], images: Images) -> Extracted:
    rows = (pool for round_ in zip_longest(*(share.pools for share in shares)) for pool in round_ if pool is not None)
    pool, constant = torch.cat(list(rows)), sum(share.constant for share in shares)
    if constant == len(pool):
        raise UserError(
            f"{images.name}: every image is of one colour, as black ones are; the sampler or decoder failed"
        )
    warnings = []
    if constant > CONSTANT_SHARE * len(pool):
        warnings.append(
            f"{images.name}: {constant} of {len(pool)} images are of one colour, as black ones are: "
            "a failed sampler or decoder makes such, and they worsen every figure"
        )
    first, *others = [share for share in shares if share.pools]  # fewer batches than ranks: some have none
    for kind, running in first.moments.items():
        for other in others:
            running.merge(other.moments[kind])
    pool_moments, spatial_moments = (first.moments[kind].moments() for kind in ("pool", "spatial"))
    return Extracted(pool_moments, spatial_moments, pool, first.size, warnings)


def _rgb(array: np.ndarray) -> np.ndarray:
    """(B, H, W, 1 or 3) -> (B, H, W, 3), writable."""
    return np.repeat(array, 3, axis=3) if array.shape[3] == 1 else array.copy()
