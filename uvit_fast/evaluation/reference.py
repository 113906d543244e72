"""The reference of a comparison: published statistics, or those of real images, computed once and cached."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvit_fast.evaluation.features import Extracted, Extractor, extract
from uvit_fast.evaluation.metrics import Statistics
from uvit_fast.evaluation.sources import Images, names_in, read_arrays
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import other_than, write_whole
from uvit_fast.runtime.processes import ALONE, World

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "pool")
FACTS = ("count", "size", "like", "features", "lossy", "grey")  # further entries of a file in the cache
ASYMMETRY = 1e-4  # relative to a covariance's largest entry; float32 stays far below
NEIGHBOURS = 10_000  # reference images for precision, recall and KID, as in ADM


@dataclass
class Reference:
    """The real images of a comparison.

    Attributes:
        pool_statistics: of the pool features. spatial_statistics: None if the file has none; then there is no sFID.
        pool: (M, D) features for precision, recall and KID, M at most 10,000; None without images.
        like: the preprocessing that the samples must have too, see `inception.preprocess`.
        count, size: images and their (height, width), if known.
        features: the identity of the extractor that made them, if known; files of other programs do not state it.
        lossy, grey: shares of images that are stored with loss (see `Images`), and without colour, if known.
    """

    name: str
    pool_statistics: Statistics
    spatial_statistics: Statistics | None = None
    pool: Tensor | None = None
    like: str = "tensorflow"
    count: int | None = None
    size: tuple[int, int] | None = None
    features: str | None = None
    lossy: float | None = None
    grey: float | None = None
    warnings: list[str] = field(default_factory=list)


def default_cache() -> Path:
    """Return the folder of the statistics of real images: $XDG_CACHE_HOME/uvit-fast, or ~/.cache/uvit-fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uvit-fast"


def load_reference(
    path: str | Path,
    extractor: Callable[[str], Extractor],
    open_images: Callable[[Path], Images],
    cache: Path,
    batch: int = 50,
    progress: bool = True,
    world: World = ALONE,
) -> Reference:
    """Load statistics from a file or a folder.

    Args:
        path: ADM's .npz (`mu, sigma, mu_s, sigma_s`, and `arr_0` for precision and recall; or `arr_0` alone),
            pytorch-fid's (`mu, sigma`), one from the cache, or a folder of images.
        extractor: preprocessing -> extractor, called only if features are to be computed.
        open_images: opens a folder or an .npz.
        world: its processes divide the images; all get the statistics.

    Raises:
        UserError: no such file, one of another kind, or statistics that no images can have.
    """
    path = Path(path)
    if path.suffix != ".npz" or not os.path.isfile(path):
        if not os.path.isdir(path):
            wanted = "expected an .npz of statistics or images, or a folder of images"
            raise UserError(f"{path}: {wanted}, got {other_than(path)}")
        return reference_from_images(open_images(path), extractor("tensorflow"), cache, batch, progress, world)
    keys = names_in(path)
    if not {"mu", "sigma"} <= keys:
        if "arr_0" not in keys:
            raise UserError(
                f"{path}: expected mu and sigma, or images arr_0, got {', '.join(sorted(keys)) or 'nothing'}"
            )
        return reference_from_images(open_images(path), extractor("tensorflow"), cache, batch, progress, world)
    reference = _read_statistics(path)
    if reference.like == "pytorch-fid":
        reference.warnings.append(
            f"{path}: mu and sigma alone, as pytorch-fid writes them: the samples are resized its way too, and the FID "
            "compares with pytorch-fid's figures, not with those of ADM's evaluator"
        )
    if reference.pool is None and "arr_0" in keys:
        images = reference_from_images(open_images(path), extractor(reference.like), cache, batch, progress, world)
        for name in ("pool", "size", "lossy", "grey"):
            setattr(reference, name, getattr(images, name))
        reference.warnings += images.warnings
    return reference


def reference_from_images(
    images: Images,
    extractor: Extractor,
    cache: Path,
    batch: int = 50,
    progress: bool = True,
    world: World = ALONE,
) -> Reference:
    """Return the statistics of real images; kept in `cache` under the identity of images and extractor, and reused.

    The ranks divide the images; rank 0 alone reads and writes the cache, and tells the others.
    """
    file: Path | None = None
    reference: Reference | None = None
    if images.identity is not None and world.rank == 0:
        key = hashlib.sha256(f"{images.identity()}\0{extractor.identity}".encode()).hexdigest()
        file = cache / f"reference-{key[:32]}.npz"
        if file.is_file():
            with contextlib.suppress(UserError):  # broken: computed anew
                reference = _read_statistics(file)
                reference.name, reference.lossy = images.name, images.lossy
    if not world.tell(reference is not None):
        found = extract(images, extractor, batch, progress, world)
        reference = _reference(found, images, extractor) if found else None
        if (
            file is not None and reference is not None and not reference.warnings
        ):  # a warning would be lost with the images
            try:
                _write_statistics(file, reference)
            except OSError as error:
                reference.warnings.append(
                    f"{cache}: cannot keep the statistics of {images.name} ({error.strerror}): they will be made anew"
                )
    if reference is not None:
        reference.warnings = [*images.warnings, *reference.warnings]
    return world.tell(reference)


def _reference(found: Extracted, images: Images, extractor: Extractor) -> Reference:
    rows = torch.randperm(len(found.pool), generator=torch.Generator().manual_seed(0))[:NEIGHBOURS].sort().values
    return Reference(
        images.name,
        found.pool_statistics,
        found.spatial_statistics,
        found.pool[rows],
        extractor.like,
        images.count,
        found.size,
        extractor.identity,
        images.lossy,
        found.grey,
        found.warnings,
    )


def _write_statistics(file: Path, reference: Reference) -> None:
    assert reference.spatial_statistics is not None and reference.pool is not None, "it is of images"
    (mu, sigma), (mu_s, sigma_s) = reference.pool_statistics, reference.spatial_statistics
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "pool": reference.pool}
    saved: dict[str, Any] = {name: value.cpu().numpy() for name, value in arrays.items()}
    saved |= {name: getattr(reference, name) for name in FACTS}
    write_whole(file, lambda path: np.savez(path, **saved))


def _read_statistics(path: Path) -> Reference:
    arrays = read_arrays(path, [*STATISTICS, *FACTS])
    # pytorch-fid's files hold only mu and sigma, of images that it resized in its own way
    like = "tensorflow" if "mu_s" in arrays else "pytorch-fid"
    pool_statistics = _mean_and_covariance(path, arrays, "mu", "sigma")
    spatial = _mean_and_covariance(path, arrays, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= arrays.keys() else None
    pool = torch.from_numpy(_numbers(path, arrays, "pool")).float() if "pool" in arrays else None
    if pool is not None and (pool.ndim != 2 or pool.shape[1] != len(pool_statistics.mu)):
        raise UserError(f"{path}: expected pool (M, {len(pool_statistics.mu)}), got {tuple(pool.shape)}")
    kinds: dict[str, Callable] = {
        "count": int,
        "size": lambda x: (int(x[0]), int(x[1])),
        "like": str,
        "features": str,
        "lossy": float,
        "grey": float,
    }
    try:
        facts = {name: kinds[name](arrays[name]) for name in FACTS if name in arrays}
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: expected {', '.join(FACTS)} as uvit-fast keeps them ({error})") from None
    facts.setdefault("like", like)
    if facts["like"] not in ("tensorflow", "pytorch-fid", "none"):
        raise UserError(f"{path}: expected like to be tensorflow, pytorch-fid or none, got {facts['like'][:80]}")
    return Reference(str(path), pool_statistics, spatial, pool, **facts)


def _mean_and_covariance(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> Statistics:
    mu, sigma = _numbers(path, arrays, mean), _numbers(path, arrays, covariance)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: expected {mean} (D,) and {covariance} (D, D), got {mu.shape} and {sigma.shape}")
    if np.abs(sigma - sigma.T).max(initial=0) > ASYMMETRY * np.abs(sigma).max(initial=0):
        raise UserError(f"{path}: {covariance}: expected a covariance, got a matrix that is not symmetric")
    return Statistics(torch.from_numpy(mu), torch.from_numpy(sigma))


def _numbers(path: Path, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return an array as float64.

    Raises:
        UserError: it is not of real numbers, or some are not finite.
    """
    values = arrays[name]
    if values.dtype.kind not in "fiu":
        raise UserError(f"{path}: {name}: expected real numbers, got {values.dtype}")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {name}: expected finite statistics, got NaN or infinity")
    return values.astype(np.float64)
