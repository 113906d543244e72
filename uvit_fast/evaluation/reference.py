"""What samples are compared with: statistics that others published, or those of real images, computed once and cached."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_fast.config import UserError
from uvit_fast.evaluation.features import Extracted, Extractor, Images, extract, open_images
from uvit_fast.evaluation.metrics import Moments
from uvit_fast.files import write_whole
from uvit_fast.ranks import ALONE, Ranks

NEIGHBOURS = 10_000  # reference images for precision, recall and KID, as ADM takes


@dataclass
class Reference:
    """The real images' side.

    Attributes:
        pool_moments: of the pool features. spatial_moments: None where the file has none; then there is no sFID.
        pool: (M, D) features for precision, recall and KID, M at most 10,000; None where there are no images.
        like: the preprocessing that the samples must have too, see `inception.preprocess`.
        count, size: images and their (height, width), where known.
        features: the identity of the extractor that made them, where known; others' files do not say.
    """

    name: str
    pool_moments: Moments
    spatial_moments: Moments | None = None
    pool: Tensor | None = None
    like: str = "tensorflow"
    count: int | None = None
    size: tuple[int, int] | None = None
    features: str | None = None
    warnings: list[str] = field(default_factory=list)


def default_cache() -> Path:
    """Where statistics of real images are kept: $XDG_CACHE_HOME/uvit-fast, or ~/.cache/uvit-fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uvit-fast"


def load_reference(
    path: str | Path,
    extractor: Callable[[str], Extractor],
    cache: Path,
    batch: int = 50,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Reference:
    """Statistics from a file or a folder.

    Args:
        path: ADM's .npz (`mu, sigma, mu_s, sigma_s`, and `arr_0` for precision and recall; or `arr_0` alone), pytorch-fid's
            (`mu, sigma`), one of the cache's, or a folder of images.
        extractor: preprocessing -> what makes the features, called only if some are to be made.
        ranks: they divide the images; every one has the statistics in the end.

    Raises:
        UserError: no such file, one of another kind, or statistics that no images can have.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        if not path.is_dir():
            raise UserError(
                f"{path}: no such reference; expected an .npz of statistics or images, or a folder of images"
            )
        return reference_from_images(open_images(path), extractor("tensorflow"), cache, batch, progress, ranks)
    try:
        with np.load(path) as archive:
            keys = set(archive.files)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable .npz ({error})") from None
    if not {"mu", "sigma"} <= keys:
        if "arr_0" not in keys:
            raise UserError(
                f"{path}: expected mu and sigma, or images arr_0, got {', '.join(sorted(keys)) or 'nothing'}"
            )
        return reference_from_images(open_images(path), extractor("tensorflow"), cache, batch, progress, ranks)
    reference = _read_statistics(path)
    if reference.like == "pytorch-fid":
        reference.warnings.append(
            f"{path}: mu and sigma alone, as pytorch-fid writes them: the samples are resized its way too, and the FID "
            "compares with pytorch-fid's figures, not with those of ADM's evaluator"
        )
    if reference.pool is None and "arr_0" in keys:
        images = reference_from_images(open_images(path), extractor(reference.like), cache, batch, progress, ranks)
        reference.pool, reference.size = images.pool, images.size
        reference.warnings += images.warnings
    return reference


def reference_from_images(
    images: Images,
    extractor: Extractor,
    cache: Path,
    batch: int = 50,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Reference:
    """Statistics of real images; kept in `cache` under the identity of images and extractor, and taken from there again.

    The ranks divide the images; rank 0 alone reads and writes the cache, and tells the others.
    """
    file = reference = None
    if images.identity is not None and ranks.rank == 0:
        key = hashlib.sha256(f"{images.identity()}\0{extractor.identity}".encode()).hexdigest()
        file = cache / f"reference-{key[:32]}.npz"
        if file.is_file():
            reference = _read_statistics(file)
            reference.name = images.name
    if not ranks.tell(reference is not None):
        found = extract(images, extractor, batch, progress, ranks)
        reference = found and _reference(found, images, extractor)
        if file is not None and not reference.warnings:  # a warning would be lost with the images
            _write_statistics(file, reference)
    return ranks.tell(reference)


def _reference(found: Extracted, images: Images, extractor: Extractor) -> Reference:
    rows = torch.randperm(len(found.pool), generator=torch.Generator().manual_seed(0))[:NEIGHBOURS].sort().values
    return Reference(
        images.name,
        found.pool_moments,
        found.spatial_moments,
        found.pool[rows],
        getattr(extractor, "like", "none"),
        images.count,
        tuple(map(int, found.size)),
        extractor.identity,
        found.warnings,
    )


def _write_statistics(file: Path, reference: Reference) -> None:
    (mu, sigma), (mu_s, sigma_s) = reference.pool_moments, reference.spatial_moments
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "pool": reference.pool}
    saved = {name: value.cpu().numpy() for name, value in arrays.items()}
    saved |= {name: getattr(reference, name) for name in ("count", "size", "like", "features")}
    write_whole(file, lambda path: np.savez(path, **saved))


def _read_statistics(path: Path) -> Reference:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name not in ("arr_0", "arr_1")}
    # pytorch-fid's files hold mu and sigma alone, of images that it resized its own way
    like = "tensorflow" if "mu_s" in arrays else "pytorch-fid"
    pool = torch.from_numpy(arrays["pool"]) if "pool" in arrays else None
    spatial = _moments(path, arrays, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= arrays.keys() else None
    return Reference(
        str(path),
        _moments(path, arrays, "mu", "sigma"),
        spatial,
        pool,
        str(arrays.get("like", like)),
        int(arrays["count"]) if "count" in arrays else None,
        tuple(map(int, arrays["size"])) if "size" in arrays else None,
        str(arrays["features"]) if "features" in arrays else None,
    )


def _moments(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> Moments:
    mu, sigma = arrays[mean], arrays[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: expected {mean} (D,) and {covariance} (D, D), got {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: expected finite statistics, got NaN or infinity")
    return Moments(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double())
