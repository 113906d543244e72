"""Cached layers: which sublayers of a network reuse their last output at which evaluation, and the outputs that are
kept for that.

A sublayer is what a residual block adds to its stream: its attention or its MLP. A plan is fixed before the loop
starts, so that a captured loop holds the kernels of what is computed and no others. Sources: Learning-to-Cache (Ma et
al. 2024), SmoothCache (Liu et al. 2024), Skip-DiT (Chen et al. 2024).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Plan = tuple[frozenset[str], ...]  # of each evaluation: the sublayers that reuse their last output
LATE = 0.02  # times t up to which Skip-DiT computes everything


class Layers(NamedTuple):
    """What one evaluation does: `reuse` these sublayers' outputs, `keep` those of others for a later one."""

    reuse: frozenset[str]
    keep: frozenset[str]


def layers(plan: Plan) -> list[Layers | None]:
    """Return what each evaluation of a plan does; None where that is nothing but computing."""
    following = [*plan[1:], frozenset()]
    each = [Layers(reuse, later - reuse) for reuse, later in zip(plan, following)]
    return [one if one.reuse or one.keep else None for one in each]


def most_kept(each: Iterable[Layers | None]) -> int:
    """Return how many sublayers' outputs a loop holds in the end, each (rows, L, D)."""
    return len(frozenset[str]().union(*(one.keep for one in each if one)))


class LayerCache:
    """The kept outputs of one loop, as one evaluation sees them.

    Guided evaluations have both branches in a batch of 2B, the conditional one first, and so do the outputs that they
    keep: a branch reuses its own. An unguided evaluation reads the first half. The first guided one after unguided
    ones has nothing of its second half and computes.
    """

    def __init__(self, held: dict[str, Tensor], reuse: frozenset[str], keep: frozenset[str]):
        """held: of the whole loop, name -> (rows, L, D); filled here."""
        self.held, self.reuse, self.keep = held, reuse, keep

    def find(self, name: str, rows: int) -> Tensor | None:
        """Return what the sublayer is to reuse, (rows, L, D); None: compute."""
        held = self.held.get(name) if name in self.reuse else None
        return None if held is None or len(held) < rows else held[:rows]

    def wants(self, name: str) -> bool:
        """Return whether the output of a sublayer that is computed must be kept."""
        return name in self.keep or name in self.reuse

    def leave(self, name: str, before: Tensor, after: Tensor) -> None:
        """Keep what a sublayer added to the stream, of which `before` and `after` are (rows, L, D)."""
        held = self.held.get(name)
        if held is not None and held.shape == after.shape:
            torch.sub(after, before, out=held)
        else:
            self.held[name] = after - before


def outer_plan(times: Sequence[float], begins: Sequence[bool], inner: Iterable[str], every: int) -> Plan:
    """Return the plan that computes the `inner` sublayers at one of `every` evaluations, the others always
    (Skip-DiT's schedule).

    Skip-DiT replaces the stream where the last outer blocks begin; here the inner blocks' long skips still run.
    Evaluations inside an interval of order 2 or 3 are always whole, since an output that equals the one at the
    interval's start takes the order away, and so are those at t <= 0.02.

    Args:
        times, begins: the schedule's t of each evaluation, and whether an interval of the solver begins there.
    """
    reusable, whole, since = (
        frozenset(inner),
        frozenset[str](),
        every,
    )  # evaluations since the last whole one, itself included
    plan = []
    for t, begin in zip(times, begins):
        reused = begin and t > LATE and since < every
        since = since + 1 if reused else 1
        plan.append(reusable if reused else whole)
    return tuple(plan)
