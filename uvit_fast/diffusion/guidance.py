"""Classifier-free guidance: eps = cond + s (cond - uncond), with both branches in one batch of 2B. The formula is the
same for any other prediction: at a given state all are affine in eps.

s is the paper's: s = 0.4 is a guidance scale of 1.4 in the convention of DiT and diffusers; s = 0 runs one branch.
Configs and this package's functions take s as `guidance_scale`; `uvit-fast sample --cfg-scale` and the pipeline's
`guidance_scale` are 1 + s.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

EpsFn = Callable[..., Tensor]  # (x (B, C, H, W), network time (B,)) -> eps (B, C, H, W)
ALWAYS = (0.0, 1.0)


class Guidance:
    """A guided eps_fn(x, t). The samplers take its two branches and combine them inside their update.

    Args:
        model: model(x, t, **condition) -> eps. x, of one image, and t may be views of the same memory twice.
        condition: name -> (B, ...), such as {"y": labels} or {"context": text features}.
        null: name -> the null condition: a number, or a tensor without the batch dimension.
        scale: the paper's s; a () fp32 tensor may change between two calls.
        interval: guide where the schedule's time t in [0, 1] (0: data) lies inside, run one branch elsewhere
            (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality
            in Diffusion Models", where it is given in noise levels sigma / alpha). The samplers respect it; a direct
            call always guides.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        condition: dict[str, Tensor],
        null: Mapping[str, Tensor | int | None],
        scale: float | Tensor,
        interval: tuple[float, float] = ALWAYS,
    ):
        if not condition:
            raise ValueError("guidance: expected a condition (labels or text features), got none")
        known = {name: value for name, value in null.items() if value is not None}
        if missing := condition.keys() - known.keys():
            raise ValueError(f"guidance: expected a null value for {', '.join(sorted(missing))}, got none")
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance interval: expected 0 <= first <= last <= 1, got {interval}")
        self.model, self.condition, self.interval = model, condition, interval
        self.both = {name: _with_null(value, known[name]) for name, value in condition.items()}  # (2B, ...) each
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=next(iter(condition.values())).device)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided eps (B, C, H, W) fp32 at x (B, C, H, W) and the network's time t (B,)."""
        cond, uncond = self.branches(x, t).float().chunk(2)  # (B, C, H, W) each
        return cond + self.scale * (cond - uncond)

    def branches(self, x: Tensor, t: Tensor, **cache: Any) -> Tensor:
        """Return both branches from one call of the network: (2B, C, H, W), conditional first."""
        return self.model(_twice(x), _twice(t), **self.both, **cache)

    def conditional(self, x: Tensor, t: Tensor, **cache: Any) -> Tensor:
        """Return the conditional branch alone: (B, C, H, W)."""
        return self.model(x, t, **self.condition, **cache)


def evaluate(eps_fn: EpsFn, x: Tensor, time: Tensor, t: float, **cache: Any) -> tuple[Tensor, Tensor | None]:
    """Evaluate the network once at its `time` (B,), which corresponds to the schedule's t, for the solver's update.

    Args:
        cache: the `LayerCache` of a plan's evaluation, passed on to the network: see `diffusion.caching`.

    Returns:
        eps (B, ...) and None, or both branches (2B, ...) and their guidance scale.
    """
    if not isinstance(eps_fn, Guidance):
        return eps_fn(x, time, **cache), None
    first, last = eps_fn.interval
    if first <= t <= last:
        return eps_fn.branches(x, time, **cache), eps_fn.scale
    return eps_fn.conditional(x, time, **cache), None


def _twice(value: Tensor) -> Tensor:
    """Return (2B, ...), the values twice: a copy, or a view of one image or of one time for all."""
    return value.expand(2, *value.shape).flatten(0, 1)


def _with_null(value: Tensor, null: Tensor | int) -> Tensor:
    """Return the condition (B, ...) followed by as many null conditions: (2B, ...)."""
    if isinstance(null, Tensor):
        return torch.cat([value, null.to(value).expand_as(value)])
    return torch.cat([value, torch.full_like(value, null)])
