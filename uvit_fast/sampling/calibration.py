"""Calibrate a plan of cached layers on a few trajectories of the checkpoint itself (SmoothCache, Liu et al. 2024,
Section 3).

For every attention and MLP the error of reusing an older output is measured: the mean of |old - new| over that of
|new|. Where it stays below a bound, the output is reused, for at most one, two or three evaluations in a row; the bound
is the smallest that gives the requested speed-up. SmoothCache averages over the blocks and looks three evaluations
ahead; here each sublayer has its own schedule, and of the three plans samples choose.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn as nn
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.diffusion.caching import Plan
from uvit_fast.diffusion.stages import Stage
from uvit_fast.model.uvit import UViT
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.loop import sample

LONGEST = 3  # consecutive evaluations that reuse an output
LEAST = 0.25  # weight of the start of an interval


class Found(NamedTuple):
    """A plan, the largest weighted error of what it reuses, and its speed-up in multiply-adds."""

    plan: Plan
    bound: float
    speedup: float


class _Watching(nn.Module):
    """The network, called unchanged, as the `Cache` of its evaluations, which measures the errors of its sublayers.

    Attributes:
        errors: for each evaluation, by gap and sublayer; () fp32 tensors, where an older output with as many rows
            exists.
        rows: for each evaluation, over the first one's.
    """

    def __init__(self, net: UViT):
        super().__init__()
        self.net = net
        self.errors: list[dict[tuple[int, str], Tensor]] = []
        self.rows: list[int] = []
        self._last: deque[dict[str, Tensor]] = deque(maxlen=LONGEST + 1)  # newest first, the current one's included

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        self.errors.append({})
        self.rows.append(len(x))
        self._last.appendleft({})
        return self.net(x, t, **condition, cache=self)

    def find(self, name: str, rows: int) -> None:
        return None

    def wants(self, name: str) -> bool:
        return True

    def leave(self, name: str, before: Tensor, after: Tensor) -> None:
        new = (after - before).float()
        for gap, outputs in enumerate(list(self._last)[1:], 1):
            if len(old := outputs[name]) >= len(new):
                self.errors[-1][gap, name] = (old[: len(new)].float() - new).abs().mean() / new.abs().mean()
        self._last[0][name] = after - before


class Errors(NamedTuple):
    """The errors of reusing, in an evaluation, a sublayer's output from `gap` evaluations before."""

    values: np.ndarray  # (evaluations, gaps, sublayers), infinite where there is nothing to reuse
    rows: list[int]  # of each evaluation: 2 B if both branches run


def measure(net: UViT, cfg: Config, num: int, names: Sequence[str], **options) -> Errors:
    """Measure the errors on `num` trajectories.

    Args:
        cfg: without a plan. names: the sublayers, see `model.cached`. options: for `sampling.sample`.
    """
    watching = _Watching(net)
    for _ in sample(watching, cfg, num, batch=num, **options):
        pass
    values = np.full((len(watching.errors), LONGEST, len(names)), np.inf)
    for evaluation, found in enumerate(watching.errors):
        for (gap, name), error in found.items():
            values[evaluation, gap - 1, names.index(name)] = float(error)
    return Errors(values, watching.rows)


def stage_weights(stages: Sequence[Stage]) -> list[float]:
    """Return the weight of an error in each evaluation: its output's share of its interval's end, times the evaluations
    in the interval.

    For order 2 that is 0, 2, for order 3 about 3/4, 0, 9/4 (DPM-Solver, Algorithms 1 and 2). Starts count at least 1/4,
    since the inner states follow from them. Inner evaluations all count as the most expensive one of the interval, the
    middle one of order 3 included: reused, it would equal the start, which would lower the order.
    """
    weights: list[float] = []
    interval = 0  # the interval's evaluations so far
    for stage in stages:
        interval += 1
        if stage.last:
            shares = np.abs(stage.update.outputs[-interval:])
            shares = shares / shares.sum() * interval
            weights += [max(LEAST, float(shares[0])), *[float(shares.max())] * (interval - 1)]
            interval = 0
    return weights


def find(
    errors: Errors, weights: Sequence[float], names: Sequence[str], costs: Sequence[float], whole: float, speedup: float
) -> list[Found]:
    """Return plans that reach the `speedup`, each with the smallest bound on the weighted errors that does: one that
    reuses outputs for one evaluation in a row, one for at most two, one for at most three, as far as they reach it.

    Older outputs leave more to choose from, but also change what later layers see, which no single error shows: which
    plan is best only samples tell. The first and the last evaluation are always computed.

    Args:
        costs: multiply-adds of each sublayer. whole: of the network; both for one image.

    Raises:
        UserError: no plan is that fast.
    """
    weighted = errors.values * np.asarray(weights)[:, None, None]
    found = [_smallest(weighted[:, :gaps], errors.rows, names, costs, whole, speedup) for gaps in range(1, LONGEST + 1)]
    if fast := [each for each in found if each.speedup >= speedup]:
        return fast
    most = max(each.speedup for each in found)
    raise UserError(
        f"--speedup {speedup:g}: with these evaluations expected at most {most:.2f}, all that can be reused"
    )


def _smallest(
    weighted: np.ndarray, rows: list[int], names: Sequence[str], costs: Sequence[float], whole: float, speedup: float
) -> Found:
    """Return the plan with the smallest bound that reaches the speedup, else the fastest; weighted: (evaluations, gaps,
    sublayers).
    """
    bounds = np.unique(weighted[np.isfinite(weighted)])
    counts = np.asarray(rows, dtype=float)

    def at(bound: float) -> Found:
        reused = _scan(weighted <= bound)  # (evaluations, sublayers)
        saved = float(counts @ (reused @ np.asarray(costs)))
        plan = tuple(frozenset(name for name, reuse in zip(names, each) if reuse) for each in reused)
        return Found(plan, bound, counts.sum() * whole / (counts.sum() * whole - saved))

    best = at(float(bounds[-1]) if len(bounds) else 0.0)
    low, high = -1, len(bounds) - 1  # bounds[high] is fast enough, if any is
    while high - low > 1 and best.speedup >= speedup:
        middle = (low + high) // 2
        if (found := at(float(bounds[middle]))).speedup >= speedup:
            best, high = found, middle
        else:
            low = middle
    return best


def _scan(allowed: np.ndarray) -> np.ndarray:
    """Return the greedy schedule (evaluations, sublayers) from which outputs may be reused (evaluations, gaps,
    sublayers).
    """
    steps, gaps, count = allowed.shape
    reused = np.zeros((steps, count), dtype=bool)
    for k in range(count):
        gap = 0
        for i in range(1, steps - 1):
            gap = gap + 1 if gap < gaps and allowed[i, gap, k] else 0
            reused[i, k] = gap > 0
    return reused
