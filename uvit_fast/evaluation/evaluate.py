"""Every figure of the appendix's Table 3 from samples and a reference, with a warning for whatever makes them incomparable."""

import json
from pathlib import Path

import torch

from uvit_fast.config import UserError
from uvit_fast.evaluation.features import Extractor, Images, extract
from uvit_fast.evaluation.metrics import Moments, frechet_distance, inception_score, kernel_distance, precision_recall
from uvit_fast.evaluation.reference import Reference
from uvit_fast.files import write_whole
from uvit_fast.ranks import ALONE, Ranks

USUAL = 50_000  # samples of published figures


def evaluate(
    images: Images,
    reference: Reference,
    extractor: Extractor,
    batch: int = 50,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> dict | None:
    """FID, sFID, Inception score, precision, recall and KID of samples, as far as the reference allows.

    Args:
        extractor: the one that the reference's features come from.
        ranks: they divide the samples; rank 0 has the result, the others None.

    Returns:
        "metrics": name -> value, names with the extractor's prefix; "warnings": sentences, each with its consequence; "samples",
        "reference", "features": what was compared; "num_samples", "num_reference".

    Raises:
        UserError: images of another size than the reference's, features of another kind, or images that failed.
    """
    if reference.features not in (None, extractor.identity):
        raise UserError(
            f"{reference.name}: expected statistics of {extractor.identity}, got {reference.features}: features of other "
            "weights or another preprocessing do not compare"
        )
    found = extract(images, extractor, batch, progress, ranks)
    if found is None:
        return None
    size, D = tuple(map(int, found.size)), found.pool.shape[1]
    if reference.size is not None and reference.size != size:
        raise UserError(
            f"{images.name}: images of {size[1]} x {size[0]} pixels, but {reference.name} has "
            f"{reference.size[1]} x {reference.size[0]}: the figures would measure the resizing; resample one of them"
        )
    if len(reference.pool_moments.mu) != D:
        raise UserError(
            f"{reference.name}: expected statistics of {D} dimensions, got {len(reference.pool_moments.mu)}: "
            "other features than the samples'"
        )
    warnings = [*reference.warnings, *found.warnings, *_count_warnings(images, reference, extractor)]
    device = extractor.device
    pool = found.pool.to(device)

    def distance(a: Moments, b: Moments) -> float:
        return frechet_distance(Moments(*(x.to(device) for x in a)), Moments(*(x.to(device) for x in b)))

    metrics = {"fid": distance(found.pool_moments, reference.pool_moments)}
    if reference.spatial_moments is None:
        warnings.append(f"{reference.name}: has no spatial statistics (mu_s, sigma_s): no sFID")
    elif len(reference.spatial_moments.mu) != len(found.spatial_moments.mu):
        raise UserError(f"{reference.name}: its spatial statistics are of other features than the samples'")
    else:
        metrics["sfid"] = distance(found.spatial_moments, reference.spatial_moments)
    order = torch.arange(len(pool))
    if images.ordered_by_class:  # splits of consecutive samples must hold all classes
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    probabilities = torch.cat([extractor.probabilities(pool[rows.to(device)]).cpu() for rows in order.split(1000)])
    metrics["is"] = inception_score(probabilities)
    if reference.pool is None:
        warnings.append(f"{reference.name}: statistics without images: no precision, recall and KID")
    else:
        real = reference.pool.to(device)
        if min(len(pool), len(real)) > 3:
            metrics["precision"], metrics["recall"] = precision_recall(pool, real)
        else:
            warnings.append("three images or fewer on a side: no precision and recall")
        metrics["kid"], metrics["kid_std"] = kernel_distance(pool, real)
    return {
        "metrics": {extractor.prefix + name: value for name, value in metrics.items()},
        "warnings": warnings,
        "samples": images.name,
        "num_samples": images.count,
        "reference": reference.name,
        "num_reference": reference.count,
        "features": extractor.identity,
    }


def _count_warnings(images: Images, reference: Reference, extractor: Extractor) -> list[str]:
    warnings, D = [], extractor.pool_dim
    for name, count in ((images.name, images.count), (reference.name, reference.count)):
        if count is not None and count < D:
            warnings.append(
                f"{name}: {count} images, fewer than the {D} feature dimensions: "
                "the covariance is singular, the distances are biased upwards and no published figure compares"
            )
    if not extractor.prefix and D <= images.count < USUAL:
        warnings.append(
            f"{images.name}: {images.count} images; published figures are of {USUAL:,}, and FID is larger with fewer"
        )
    return warnings


def table(result: dict) -> str:
    """The figures as lines for a person."""
    against = "" if result["num_reference"] is None else f" ({result['num_reference']:,} images)"
    lines = [f"{result['num_samples']:,} samples of {result['samples']} against {result['reference']}{against}"]
    for name, value in result["metrics"].items():
        lines.append(f"  {name:18s}{value:.6g}")
    return "\n".join(lines)


def write(result: dict, path: Path) -> None:
    """The result as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write_text(json.dumps(result, indent=2) + "\n"))
