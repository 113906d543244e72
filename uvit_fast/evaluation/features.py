"""Images in, features and their statistics out, a batch at a time.

Only the pool features make memory grow with the number of images (8 KB per image for Inception).
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from uvit_fast.evaluation.inception import Features, Inception, preprocess
from uvit_fast.evaluation.metrics import RunningStatistics, Statistics
from uvit_fast.evaluation.sources import Images
from uvit_fast.runtime.device import as_device, set_to
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import ALONE, World
from uvit_fast.runtime.progress import Bar

CONSTANT_SHARE = 0.01  # share of single-coloured images above which there is a warning


class Extractor(Protocol):
    """Turns images into features."""

    prefix: str  # of the figures' names: "" for Inception's, "digits-" for the classifier's
    identity: str  # changes whenever the features would
    like: str  # the preprocessing, see `inception.preprocess`; "none" where there is no choice
    device: torch.device
    pool_dim: int

    def __call__(self, images: Tensor) -> Features:
        """Extract the features of (B, H, W, 3) uint8 on `device`."""

    def probabilities(self, pool: Tensor) -> Tensor:
        """Return class probabilities (B, K) from pool features (B, D)."""


class InceptionFeatures:
    """Pool3 and the spatial features of the 2015 Inception.

    Args:
        model, sha: from `load_inception`.
        like: the preprocessing, see `inception.preprocess`.
    """

    prefix, pool_dim = "", 2048

    def __init__(self, model: Inception, sha: str, device: torch.device | str, like: str = "tensorflow"):
        self.device, self.like = as_device(device), like
        self.model = model.to(self.device)
        self.identity = f"inception-{sha[:16]}-{like}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        cudnn: Any = torch.backends.cudnn
        exact = set_to(cudnn.conv, fp32_precision="ieee")  # TF32 would change the features in the fourth digit
        with exact, set_to(cudnn, enabled=True, benchmark=True, deterministic=False):
            return self.model(preprocess(images, self.like))

    @torch.inference_mode()
    def probabilities(self, pool: Tensor) -> Tensor:
        return self.model.probabilities(pool)


@dataclass
class Extracted:
    """For N images: statistics of both features; pool (N, D) fp32 on the CPU; their (height, width); the share without
    colour; and whatever was odd about them."""

    pool_statistics: Statistics
    spatial_statistics: Statistics
    pool: Tensor
    size: tuple[int, int]
    grey: float
    warnings: list[str]


def extract(
    images: Images, extractor: Extractor, batch: int = 50, progress: bool = True, world: World = ALONE
) -> Extracted | None:
    """Extract the features of all images, with progress and the time left on stderr.

    Args:
        world: its processes divide the batches; the features have the images' order, whatever their number.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        UserError: fewer than two images, images without any contrast, or features that are not finite.
    """
    if images.count < 2:
        raise UserError(f"{images.name}: expected at least 2 images, got {images.count}")
    parts = [range(start, min(start + batch, images.count)) for start in range(0, images.count, batch)]
    mine, share = world.share(parts), _Share()
    described = f"features of {images.name}"
    with Bar(what=described, unit="images", total=images.count, quiet=not progress or world.rank > 0) as bar:
        for array in images.read(mine):
            share.add(array, extractor, images.name)
            bar.update(min(len(array) * world.size, images.count - bar.n))  # the others keep pace
            world.check()
    shares = world.gather(share.on_cpu() if world.size > 1 else share)
    return None if shares is None else _merged(shares, images)


class _Share:
    """What one process found in the images that it read."""

    def __init__(self):
        self.pools: list[Tensor] = []
        self.statistics: dict[str, RunningStatistics] = {}
        self.size, self.constant, self.grey = None, 0, 0

    def add(self, array: np.ndarray, extractor: Extractor, name: str) -> None:
        self.size = array.shape[1:3]
        flat = array.reshape(len(array), -1, array.shape[-1])
        self.constant += int((flat == flat[:, :1]).all((1, 2)).sum())
        self.grey += int((flat == flat[:, :, :1]).all((1, 2)).sum())
        features = extractor(torch.from_numpy(_rgb(array)).to(extractor.device))
        for kind, x in features._asdict().items():
            if not torch.isfinite(x).all():
                raise UserError(f"{name}: {kind} features are NaN or infinite; no figure would mean anything")
            self.statistics.setdefault(kind, RunningStatistics(x.shape[1], extractor.device)).update(x)
        self.pools.append(features.pool.float().cpu())

    def on_cpu(self) -> "_Share":
        self.statistics = {kind: running.to("cpu") for kind, running in self.statistics.items()}
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
    first, *others = [share for share in shares if share.pools]  # with fewer batches than ranks, some have none
    for kind, running in first.statistics.items():
        for other in others:
            running.merge(other.statistics[kind])
    pool_statistics, spatial_statistics = (first.statistics[kind].statistics() for kind in ("pool", "spatial"))
    assert first.size is not None, "it has seen images"
    height, width = map(int, first.size)
    grey = sum(share.grey for share in shares) / len(pool)
    return Extracted(pool_statistics, spatial_statistics, pool, (height, width), grey, warnings)


def _rgb(array: np.ndarray) -> np.ndarray:
    """Convert (B, H, W, 1 or 3) to (B, H, W, 3), writable."""
    return np.repeat(array, 3, axis=3) if array.shape[3] == 1 else array.copy()
