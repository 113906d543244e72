"""The conditions of samples: labels that a model has, guidance that it was trained for, equal shares of both."""

import math

import torch
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.provenance import Provenance, shown
from uvit_fast.runtime.errors import UserError


def chosen_labels(text: str | None, cfg: Config, known: Provenance) -> list[int]:
    """Return the labels that a text names, see `Provenance.labels`; None: all that the model learned.

    Raises:
        UserError: a class that the model does not have or never saw; a model without classes.
    """
    if text is not None and not cfg.model.num_classes:
        raise UserError(f"classes {text}: {_without_classes(cfg)}")
    rows = cfg.model.num_classes - (cfg.null_label is not None)
    learned = min(rows, len(known.classes) or rows)  # a model may have more rows than its data had classes
    labels = list(range(learned)) if text is None else check_labels(known.labels(text, rows), cfg)
    if unseen := [label for label in labels if label >= learned]:
        raise UserError(f"classes: the model saw labels from 0 to {learned - 1} only, got {shown(map(str, unseen))}")
    return labels


def check_labels(labels: list[int], cfg: Config) -> list[int]:
    """Refuse labels that the model does not have; the null label is not a class."""
    classes = cfg.model.num_classes - (cfg.null_label is not None)
    if not cfg.model.num_classes:
        raise UserError(f"classes {labels}: {_without_classes(cfg)}")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise UserError(f"classes: expected labels from 0 to {classes - 1}, got {', '.join(map(str, wrong))}")
    return labels


def check_guidance(scale: float, cfg: Config) -> None:
    """Refuse a scale, the paper's s, that is not a number of at least 0, or a model without an unconditional branch."""
    if not 0 <= scale < math.inf:
        raise UserError(f"guidance: expected a scale of at least 0 (none), got {scale:g}")
    if scale > 0 and cfg.train.p_uncond == 0:
        conditional = cfg.model.num_classes or cfg.model.context_dim
        why = "was trained without dropping its condition (train.p_uncond)" if conditional else "has no condition"
        raise UserError(
            f"guidance: {cfg.name} {why}; expected none: sample.guidance_scale=0, which is --cfg-scale 1; "
            f"got {scale:g}, which is --cfg-scale {1 + scale:g}"
        )


def _without_classes(cfg: Config) -> str:
    text = "; it takes prompts" if cfg.model.context_dim else ", since it was trained with model.num_classes=0"
    return f"the model of {cfg.name} is not class-conditional{text}"


def spread(num: int, items: list) -> list:
    """Return `num` items that go through `items` in equal shares, in order."""
    return [items[i * len(items) // num] for i in range(num)]


def spread_labels(num: int, classes: list[int]) -> Tensor:
    """Return (num,) labels that go through `classes` in equal shares, sorted as in a grid."""
    return torch.tensor(spread(num, classes))
