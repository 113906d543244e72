"""Every figure of the appendix's Table 3 from samples and a reference, with a warning for whatever makes them
incomparable.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from uvit_fast.evaluation.features import Extracted, Extractor, extract
from uvit_fast.evaluation.metrics import (
    SPLIT,
    Statistics,
    adm_inception_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from uvit_fast.evaluation.reference import Reference
from uvit_fast.evaluation.sources import Images
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole
from uvit_fast.runtime.processes import ALONE, World

USUAL = 50_000  # samples behind published figures
ALIKE = 0.1  # shares of samples and reference that differ by no more count as equal


def evaluate(
    images: Images,
    reference: Reference,
    extractor: Extractor,
    batch: int = 50,
    progress: bool = True,
    world: World = ALONE,
) -> dict | None:
    """Compute FID, sFID, Inception score, precision, recall and KID of samples, as far as the reference allows.

    Args:
        extractor: the one that made the reference's features.
        world: its processes divide the samples; rank 0 gets the result, the others None.

    Returns:
        "metrics": name -> value, names with the extractor's prefix; "warnings": sentences, each with its consequence;
        "samples", "reference", "features": what was compared; "num_samples", "num_reference".

    Raises:
        UserError: images of another size than the reference's, features of another kind, or images that cannot be
            evaluated.
    """
    if reference.features not in (None, extractor.identity):
        raise UserError(
            f"{reference.name}: expected statistics of {extractor.identity}, got {reference.features}: "
            "features of other "
            "weights or another preprocessing do not compare"
        )
    D = len(reference.pool_statistics.mu)
    if extractor.pool_dim != D:
        raise UserError(
            f"{reference.name}: expected statistics of {extractor.pool_dim} dimensions, got {D}: "
            "other features than the samples'"
        )
    found = extract(_of_size(images, reference), extractor, batch, progress, world)
    if found is None:
        return None
    warnings = [*reference.warnings, *images.warnings, *found.warnings, *_differences(images, found, reference)]
    warnings += _count_warnings(images, reference, extractor)
    device = extractor.device
    pool = found.pool.to(device)

    def distance(a: Statistics, b: Statistics) -> float:
        try:
            found = frechet_distance(a, b)
        except (ValueError, torch.linalg.LinAlgError) as error:  # the samples' own are a covariance
            raise UserError(f"{reference.name}: statistics that no images have: {error}") from None
        if not math.isfinite(found):
            raise UserError(f"{reference.name}: statistics that no images have: too large for a finite distance")
        return found

    metrics = {"fid": distance(found.pool_statistics, reference.pool_statistics)}
    if reference.spatial_statistics is None:
        warnings.append(f"{reference.name}: has no spatial statistics (mu_s, sigma_s): no sFID")
    elif len(reference.spatial_statistics.mu) != len(found.spatial_statistics.mu):
        raise UserError(f"{reference.name}: its spatial statistics are of other features than the samples'")
    else:
        metrics["sfid"] = distance(found.spatial_statistics, reference.spatial_statistics)
    probabilities = torch.cat([extractor.probabilities(rows).cpu() for rows in pool.split(1000)])
    metrics["is"] = inception_score(probabilities)
    if (adms := adm_inception_score(probabilities)) != metrics["is"]:
        warnings.append(
            f"{images.name}: the Inception score is of full splits of {SPLIT:,}, drawn at random from the "
            f"{images.count:,} images: {_why_not_adms(images.count)}. "
            f"ADM's evaluator, which splits them in their order, would give {adms:.6g}"
        )
    if reference.pool is None:
        warnings.append(f"{reference.name}: statistics without images: no precision, recall and KID")
    else:
        real = reference.pool.to(device)
        if min(len(pool), len(real)) > 3:
            metrics["precision"], metrics["recall"] = precision_recall(pool, real, progress=progress)
        else:
            warnings.append("three images or fewer on a side: no precision and recall")
        metrics["kid"], metrics["kid_std"] = kernel_distance(pool, real, progress=progress)
    return {
        "metrics": {extractor.prefix + name: value for name, value in metrics.items()},
        "warnings": warnings,
        "samples": images.name,
        "num_samples": images.count,
        "reference": reference.name,
        "num_reference": reference.count,
        "features": extractor.identity,
    }


def _why_not_adms(count: int) -> str:
    rest = count % SPLIT
    return (
        f"the last {rest:,} would be a split that counts as much as the others"
        if rest
        else "their order moves the score, as classes one after another do"
    )


def require_size(size: tuple[int, int], name: str, reference: Reference) -> None:
    """Refuse images whose (height, width) differs from the reference's, if that is known.

    Raises:
        UserError: they differ.
    """
    if reference.size not in (None, size):
        raise UserError(
            f"{name}: images of {size[1]} x {size[0]} pixels, but {reference.name} has "
            f"{reference.size[1]} x {reference.size[0]}: the figures would measure the resizing; resample one of them"
        )


def _of_size(images: Images, reference: Reference) -> Images:
    """Return the same images, with an error at the first that is not of the reference's size: before hours pass."""

    def read(parts: list[range]) -> Iterator[np.ndarray]:
        for array in images.read(parts):
            require_size(array.shape[1:3], images.name, reference)
            yield array

    return replace(images, read=read)


def _differences(images: Images, found: Extracted, reference: Reference) -> list[str]:
    """List how samples and reference differ in the way they were stored or made, which affects every distance."""
    warnings, (height, width) = [], found.size
    if reference.size is None:
        named = set(re.findall(r"(?<!\d)(?:32|64|128|256|512|1024)(?!\d)", Path(reference.name).name))
        says = "" if named <= {str(height)} else f" (its name has {', '.join(sorted(named, key=int))})"
        warnings.append(
            f"{reference.name}: does not say what size its images had{says}; the samples have {width} x {height} "
            "pixels: with another size the distances are those of the resizing, and no published figure compares"
        )
    if reference.lossy is not None and abs(images.lossy - reference.lossy) > ALIKE:
        warnings.append(
            f"{images.name}: {images.lossy:.0%} of the files are compressed with loss, as JPEG is, of {reference.name} "
            f"{reference.lossy:.0%}: the distances count the losses too, which can be larger than the difference of "
            "two models; store both alike"
        )
    if reference.grey is not None and abs(found.grey - reference.grey) > ALIKE:
        warnings.append(
            f"{images.name}: {found.grey:.0%} of the images are without colour, of {reference.name} "
            f"{reference.grey:.0%}: the distances count that"
        )
    return warnings


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
    """Format the figures as lines for the user."""
    against = "" if result["num_reference"] is None else f" ({result['num_reference']:,} images)"
    lines = [f"{result['num_samples']:,} samples of {result['samples']} against {result['reference']}{against}"]
    for name, value in result["metrics"].items():
        lines.append(f"  {name:18s}{value:.6g}")
    return "\n".join(lines)


def write(result: dict, path: Path) -> None:
    """Write the result as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write_text(json.dumps(result, indent=2) + "\n"))
