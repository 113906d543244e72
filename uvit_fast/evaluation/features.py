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
        batches: batch size -> arrays (B, H, W, 1 or 3) uint8.
        identity: called when needed; changes whenever the images do; None: never cached.
        ordered_by_class: consecutive images share a class, which would spoil splits of consecutive images.
    """

    name: str
    count: int
    batches: Callable[[int], Iterator[np.ndarray]]
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

    def read(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"{file}: not a readable image ({error})") from None

    def batches(size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(READERS) as pool:
            waiting, rest, first = deque(), iter(files), None
            while True:
                while len(waiting) < size + READERS and (file := next(rest, None)) is not None:
                    waiting.append((file, pool.submit(read, file)))
                if not waiting:
                    return
                images = []
                for file, future in [waiting.popleft() for _ in range(min(size, len(waiting)))]:
                    image = future.result()
                    first = image.shape if first is None else first
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

    return Images(str(folder), len(files), batches, identity, ordered_by_class=True)  # names often begin with the class


def _open_npz(path: Path) -> Images:
    with _array(path, "arr_0") as (_, shape, dtype):
        if len(shape) != 4 or shape[-1] not in (1, 3) or dtype != np.uint8:
            nan = "; floating images are scaled differently by everyone" if dtype.kind == "f" else ""
            raise UserError(f"{path}: arr_0: expected uint8 (N, H, W, 3), got {dtype} {shape}{nan}")
    if shape[0] == 0:
        raise UserError(f"{path}: arr_0: expected images, got none")

    def batches(size: int) -> Iterator[np.ndarray]:
        with _array(path, "arr_0") as (file, _, _):
            for start in range(0, shape[0], size):
                B = min(size, shape[0] - start)
                data = file.read(B * int(np.prod(shape[1:])))
                if len(data) < B * np.prod(shape[1:]):
                    raise UserError(f"{path}: arr_0: the file ends after {start} of {shape[0]} images")
                yield np.frombuffer(data, np.uint8).reshape(B, *shape[1:])

    def identity() -> str:
        stat = path.stat()
        return hashlib.sha256(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()

    with np.load(path) as archive:
        labels = archive["arr_1"] if "arr_1" in archive else np.zeros(0)
    by_class = labels.ndim == 1 and len(np.unique(labels)) > 1 and bool((np.diff(labels) >= 0).all())
    return Images(str(path), shape[0], batches, identity, ordered_by_class=by_class)


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


def extract(images: Images, extractor: Extractor, batch: int = 50, progress: bool = True) -> Extracted:
    """Features of all images, with progress and the time left on stderr.

    Raises:
        UserError: fewer than two images, images without any contrast, or features that are not finite.
    """
    if images.count < 2:
        raise UserError(f"{images.name}: expected at least 2 images, got {images.count}")
    pools, pool_moments, spatial_moments, size, constant = [], None, None, None, 0
    with tqdm(total=images.count, unit="image", desc=f"features of {images.name}", disable=not progress) as bar:
        for array in images.batches(batch):
            size = array.shape[1:3]
            flat = array.reshape(len(array), -1, array.shape[-1])
            constant += int((flat == flat[:, :1]).all((1, 2)).sum())
            features = extractor(torch.from_numpy(_rgb(array)).to(extractor.device))
            for kind, x in features._asdict().items():
                if not torch.isfinite(x).all():
                    raise UserError(
                        f"{images.name}: {kind} features are NaN or infinite; no figure would mean anything"
                    )
            if pool_moments is None:
                pool_moments = RunningMoments(features.pool.shape[1], extractor.device)
                spatial_moments = RunningMoments(features.spatial.shape[1], extractor.device)
            pool_moments.update(features.pool)
            spatial_moments.update(features.spatial)
            pools.append(features.pool.float().cpu())
            bar.update(len(array))
    pool = torch.cat(pools)
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
    return Extracted(pool_moments.moments(), spatial_moments.moments(), pool, size, warnings)


def _rgb(array: np.ndarray) -> np.ndarray:
    """(B, H, W, 1 or 3) -> (B, H, W, 3), writable."""
    return np.repeat(array, 3, axis=3) if array.shape[3] == 1 else array.copy()
