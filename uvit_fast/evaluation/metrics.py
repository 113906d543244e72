"""The figures of generative models as pure functions of features; float64 throughout, on any device.

N samples, M references, D feature dimensions, K classes. Definitions follow ADM's evaluator (Dhariwal and Nichol,
2021), which the paper's appendix uses: FID (Heusel et al., 2017), sFID (Nash et al., 2021: the same distance of spatial
features), Inception score (Salimans et al., 2016), improved precision and recall (Kynkäänniemi et al., 2019); KID
(Bińkowski et al., 2018).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from uvit_fast.runtime.progress import Bar

NEGATIVE = 1e-6  # relative to the largest eigenvalue; rounding stays far below it, and no covariance exceeds it
SPLIT = 5000  # samples of which ADM takes one Inception score; 10 of them are the usual 50,000
MOVED = 0.01  # relative: an order that moves the Inception score by more is not random; random ones differ by 0.2%


class Statistics(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D), float64."""

    mu: Tensor
    sigma: Tensor


class RunningStatistics:
    """Mean and covariance of features that come in batches, by Chan's update, which avoids the cancellation in a sum of
    squares.

    Args:
        dim: D.
        device: of the D x D sums, and of the batches.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add (B, D) features of any floating dtype.

        Raises:
            ValueError: another D, or features that are not finite.
        """
        x = _matrix(features, "features").to(self.mean.device)  # (B, D)
        if x.shape[1] != len(self.mean):
            raise ValueError(f"features: expected {len(self.mean)} dimensions, got {x.shape[1]}")
        B = len(x)
        if B == 0:
            return
        batch_mean = x.mean(0)  # (D,)
        centred = x - batch_mean  # (B, D)
        delta, total = batch_mean - self.mean, self.count + B
        rows = torch.cat([centred, delta[None] * (self.count * B / total) ** 0.5])  # (B + 1, D)
        self.scatter.addmm_(rows.T, rows)  # (D, D)
        self.mean += delta * (B / total)
        self.count = total

    def merge(self, other: "RunningStatistics") -> None:
        """Add another's samples, by the same update."""
        if other.count == 0:
            return
        mean, scatter = (x.to(self.mean.device) for x in (other.mean, other.scatter))
        delta, total = mean - self.mean, self.count + other.count
        self.scatter += scatter + delta[:, None] * delta * (self.count * other.count / total)  # (D, D)
        self.mean += delta * (other.count / total)
        self.count = total

    def to(self, device: torch.device | str) -> "RunningStatistics":
        """Return the same on another device."""
        moved = RunningStatistics(0, device)
        moved.count, moved.mean, moved.scatter = self.count, self.mean.to(device), self.scatter.to(device)
        return moved

    def statistics(self) -> Statistics:
        """Return the mean and unbiased covariance so far.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"covariance: expected at least 2 samples, got {self.count}")
        return Statistics(self.mean.clone(), self.scatter / (self.count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the Fréchet distance of two Gaussians: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2). With pool3 features it
    is FID.

    The trace of (A B)^1/2 is that of (A^1/2 B A^1/2)^1/2, whose argument is symmetric and positive semi-definite: two
    symmetric eigendecompositions, real and without an added epsilon, even for singular covariances. Computed on `a`'s
    device.

    Raises:
        ValueError: different dimensions, values that are not finite, or a matrix that is not a covariance.
    """
    mu_a, sigma_a = (torch.as_tensor(value, dtype=torch.float64) for value in a)
    mu_b, sigma_b = (torch.as_tensor(value, dtype=torch.float64, device=mu_a.device) for value in b)
    D = len(mu_a)
    if mu_b.shape != (D,) or sigma_a.shape != (D, D) or sigma_b.shape != (D, D):
        raise ValueError(
            "Fréchet distance: expected two means (D,) and two covariances (D, D) of one D, got "
            f"{tuple(mu_a.shape)}, {tuple(sigma_a.shape)} and {tuple(mu_b.shape)}, {tuple(sigma_b.shape)}"
        )
    for name, value in {"mean": mu_a + mu_b, "covariance": sigma_a + sigma_b}.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"Fréchet distance: expected finite statistics, got NaN or infinity in a {name}")
    sigma_a, sigma_b = ((s + s.T) / 2 for s in (sigma_a, sigma_b))
    values, vectors = torch.linalg.eigh(sigma_a)  # (D,), (D, D)
    _check_covariance(values)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (D, D)
    product = root @ sigma_b @ root  # (D, D)
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    _check_covariance(values)
    distance = (mu_a - mu_b).square().sum() + sigma_a.trace() + sigma_b.trace() - 2 * values.clamp(min=0).sqrt().sum()
    return distance.item()


def inception_score(probabilities: Tensor, split_size: int = SPLIT) -> float:
    """Return exp of the mean KL(p(y|x) || p(y)) of a split, averaged over full splits of samples in random order.

    For samples already in random order, whose number is a multiple of `split_size`, this is ADM's number
    (`adm_inception_score`). Others are shuffled by a fixed seed: where the given order moves the score, as with one
    class after another, and where samples are left over, which must not all be of one class.

    Args:
        probabilities: (N, K), rows summing to 1.
        split_size: samples per split, as in ADM. Fewer samples are one split, with a lower score.

    Raises:
        ValueError: no samples, or rows that are not probabilities.
    """
    given = adm_inception_score(probabilities, split_size)
    p = _probabilities(probabilities)  # (N, K)
    full = len(p) // split_size * split_size
    if full == 0:
        return given
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(0)).to(p.device)
    mixed = _mean_score(p, order[:full].split(split_size))
    return given if full == len(p) and abs(given / mixed - 1) <= MOVED else mixed


def adm_inception_score(probabilities: Tensor, split_size: int = SPLIT) -> float:
    """Return the score as ADM's evaluator computes it: over consecutive samples, with a last, small split that counts
    in full.

    Args, Raises: as for `inception_score`.
    """
    p = _probabilities(probabilities)  # (N, K)
    return _mean_score(p, torch.arange(len(p), device=p.device).split(split_size))


def _mean_score(p: Tensor, splits: tuple[Tensor, ...]) -> float:
    """Return the mean score of (N, K) probabilities over splits given by their rows."""
    scores = []
    for rows in splits:
        part = p[rows]  # (S, K)
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def _probabilities(x: Tensor) -> Tensor:
    p = _matrix(x, "probabilities")  # (N, K)
    if len(p) == 0:
        raise ValueError("Inception score: expected at least one sample, got none")
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("Inception score: expected rows of probabilities that sum to 1")
    return p


class PrecisionRecall(NamedTuple):
    """The share of samples within the references' manifold, and of references within the samples'."""

    precision: float
    recall: float


def precision_recall(
    samples: Tensor, reference: Tensor, k: int = 3, block: int = 1024, progress: bool = False
) -> PrecisionRecall:
    """Return improved precision and recall (Kynkäänniemi et al., 2019, Equations 1 and 2).

    A set's manifold is the union of balls around its points, whose radius is the distance to the k-th nearest neighbour
    in that set.

    Args:
        samples: (N, D); reference: (M, D). ADM takes 50K and 10K.
        k: neighbours, not counting the point itself.
        block: rows at a time; memory is block * max(N, M) float64.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: different D, or sets of no more than k points.
    """
    samples, reference = _matrix(samples, "samples"), _matrix(reference, "reference")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"precision/recall: expected one dimension, got {samples.shape[1]} and {reference.shape[1]}")
    if min(len(samples), len(reference)) <= k:
        raise ValueError(
            f"precision/recall: expected more than k = {k} points in each set, got {len(samples)} and {len(reference)}"
        )
    centre = reference.mean(0)  # distances do not change, and their squares lose fewer digits
    samples, reference = samples - centre, reference - centre
    total = 2 * len(samples) + len(reference)
    with Bar(what="precision and recall", unit="rows", total=total, delay=2, quiet=not progress) as bar:
        sample_radii, reference_radii = (_squared_radii(x, k, block, bar) for x in (samples, reference))
        precise, recalled = [], torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
        for rows, radii in zip(samples.split(block), sample_radii.split(block)):
            d = _squared_distances(rows, reference)  # (B, M)
            precise.append((d <= reference_radii).any(1))
            recalled |= (d <= radii[:, None]).any(0)
            bar.update(len(rows))
    return PrecisionRecall(torch.cat(precise).double().mean().item(), recalled.double().mean().item())


class KID(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


def kernel_distance(
    samples: Tensor, reference: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0, progress: bool = False
) -> KID:
    """Return KID: the unbiased squared MMD under the kernel (x·y / D + 1)³, over random subsets without replacement.

    Args:
        samples: (N, D); reference: (M, D).
        size: points of each set per subset; at most N and M are taken.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: different D, or fewer than two points in a set.
    """
    samples, reference = _matrix(samples, "samples"), _matrix(reference, "reference")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"KID: expected one dimension, got {samples.shape[1]} and {reference.shape[1]}")
    S, D = min(size, len(samples), len(reference)), samples.shape[1]
    if S < 2:
        raise ValueError(f"KID: expected at least 2 points in each set, got {len(samples)} and {len(reference)}")
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:S].to(x.device)]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / D + 1) ** 3  # (S, S)

    values = []
    for _ in Bar(range(subsets), what="KID", unit="subsets", delay=2, quiet=not progress):
        x, y = draw(samples), draw(reference)
        xx, yy = kernel(x, x), kernel(y, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (S * (S - 1))
        values.append(within - 2 * kernel(x, y).mean())
    distances = torch.stack(values)
    return KID(distances.mean().item(), distances.std(correction=0).item())


def _squared_radii(x: Tensor, k: int, block: int, bar: Bar) -> Tensor:
    """Return (N,), the squared distance of each point to its k-th nearest neighbour."""
    radii = []
    for start in range(0, len(x), block):
        d = _squared_distances(x[start : start + block], x)  # (B, N)
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf  # itself
        radii.append(d.kthvalue(k, dim=1).values)
        bar.update(len(d))
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (A, B) of (A, D) and (B, D)."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def _matrix(x: Tensor, name: str) -> Tensor:
    x = torch.as_tensor(x)
    if x.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return x.double()


def _check_covariance(values: Tensor) -> None:
    smallest, largest = values.min().item(), values.max().item()
    if smallest < -NEGATIVE * max(largest, 0) - 1e-12:
        raise ValueError(
            f"Fréchet distance: expected a covariance, got eigenvalues from {smallest:.3g} to {largest:.3g}"
        )
