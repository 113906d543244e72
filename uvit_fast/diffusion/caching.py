"""Layer caching: which sublayers of a network reuse their last output at which evaluation, and the outputs kept for
that.

A sublayer is what a residual block adds to its stream: its attention or its MLP. A plan is fixed before the loop
starts, so that a captured loop holds the kernels of the computed sublayers and no others. Sources: Learning-to-Cache
(Ma et al. 2024), SmoothCache (Liu et al. 2024), Skip-DiT (Chen et al. 2024).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Plan = tuple[frozenset[str], ...]  # for each evaluation: the sublayers that reuse their last output
LATE = 0.02  # up to this time t Skip-DiT computes everything


class Layers(NamedTuple):
    """The sublayers that `reuse` their outputs in one evaluation, and those whose outputs to `keep` for a later one."""

    reuse: frozenset[str]
    keep: frozenset[str]


def layers(plan: Plan) -> list[Layers | None]:
    """Return the reused and kept sublayers of each evaluation; None where it just computes."""
    following = [*plan[1:], frozenset()]
    each = [Layers(reuse, later - reuse) for reuse, later in zip(plan, following)]
    return [one if one.reuse or one.keep else None for one in each]


def most_kept(each: Iterable[Layers | None]) -> int:
    """Return how many sublayers' outputs, each (rows, L, D), a loop holds at its end."""
    return len(frozenset[str]().union(*(one.keep for one in each if one)))


class LayerCache:
    """The kept outputs of one loop, as one evaluation sees them.

    A guided evaluation has both branches in a batch of 2B, the conditional one first, and so have the outputs that it
    keeps: each branch reuses its own. An unguided evaluation reads the first half. The first guided evaluation after
    unguided ones finds no second half and computes.
    """

    def __init__(self, held: dict[str, Tensor], reuse: frozenset[str], keep: frozenset[str]):
        """held: the outputs of the whole loop, name -> (rows, L, D); filled here."""
        self.held, self.reuse, self.keep = held, reuse, keep

    def find(self, name: str, rows: int) -> Tensor | None:
        """Return the output that the sublayer reuses, (rows, L, D), or None if it must be computed."""
        held = self.held.get(name) if name in self.reuse else None
        return None if held is None or len(held) < rows else held[:rows]

    def wants(self, name: str) -> bool:
        """Return whether to keep the output of a sublayer that is computed."""
        return name in self.keep or name in self.reuse

    def leave(self, name: str, before: Tensor, after: Tensor) -> None:
        """Keep what a sublayer added to the stream: `after` - `before`, (rows, L, D) each."""
        held = self.held.get(name)
        if held is not None and held.shape == after.shape:
            torch.sub(after, before, out=held)
        else:
            self.held[name] = after - before


def outer_plan(times: Sequence[float], begins: Sequence[bool], inner: Iterable[str], every: int) -> Plan:
    """Return the plan that computes the `inner` sublayers in one of `every` evaluations and the others in all of them
    (Skip-DiT's schedule).

    Skip-DiT replaces the stream where the last outer blocks begin; here the inner blocks' long skips still run.
    Evaluations inside an interval of order 2 or 3 always compute everything, since reusing the output of the interval's
    start would lower the order, and so do those at t <= 0.02.

    Args:
        times, begins: the schedule's t of each evaluation, and whether an interval of the solver begins there.
    """
    reusable, whole, since = (
        frozenset(inner),
        frozenset[str](),
        every,
    )  # evaluations since the last full one, itself included
    plan = []
    for t, begin in zip(times, begins):
        reused = begin and t > LATE and since < every
        since = since + 1 if reused else 1
        plan.append(reusable if reused else whole)
    return tuple(plan)
