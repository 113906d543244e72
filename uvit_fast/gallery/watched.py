"""A sampler that shows its intermediate states."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from uvit_fast.diffusion.caching import Plan
from uvit_fast.diffusion.guidance import ALWAYS, EpsFn
from uvit_fast.diffusion.stages import Generator, Sampler, Stage


class Watched:
    """A `Sampler` that returns states from the noise to x_0 rather than x_0 alone: (B, F, C, H, W) fp32, x_0 last.

    A captured loop thus replays them too, with no wait for the host in between.

    Args:
        sampler: whose states these are; watching does not change them.
        frames: F at most, evenly spread over the evaluations.
        show: called as show(done, x) with each state (B, C, H, W), as soon as it is there; not within a capture.
    """

    def __init__(self, sampler: Sampler, frames: int, show: Callable[[int, Tensor], None] | None = None):
        steps = len(sampler.stages)
        self.sampler, self.frames, self.show = sampler, frames, show
        self.stages: Sequence[Stage] = sampler.stages
        self.draws_noise, self.keep = sampler.draws_noise, sampler.keep
        self.seen = sorted({-(-steps * k // frames) for k in range(1, frames + 1)})  # numbers of evaluations

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.sampler.tables(device)

    def caching(self, plan: Plan) -> Self:
        return type(self)(self.sampler.caching(plan), self.frames, self.show)

    def rehearsal(self, interval: tuple[float, float] = ALWAYS) -> Self:
        return type(self)(self.sampler.rehearsal(interval), self.frames)

    def __call__(
        self,
        eps_fn: EpsFn,
        x_T: Tensor,
        generator: Generator | None = None,
        callback: Callable[[int, int], None] | None = None,
        change: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        states = []

        def watch(i: int, x: Tensor) -> Tensor:
            x = x if change is None else change(i, x)
            if i + 1 in self.seen:
                states.append(x)
                if self.show is not None:
                    self.show(i + 1, x)
            return x

        self.sampler(eps_fn, x_T, generator, callback, watch)
        return torch.stack(states, 1)  # (B, F, C, H, W)
