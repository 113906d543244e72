"""Classifier-free guidance: eps = cond + s (cond - uncond), both branches in one batch of 2B.

s is the paper's: s = 0.4 is a guidance scale of 1.4 in the convention of DiT and diffusers; s = 0 runs one branch.
"""

import torch
from torch import Tensor

from uvit_fast.diffusion.samplers import EpsFn


def class_guidance(model, y: Tensor, null_label: int | None, scale: float) -> EpsFn:
    """eps_fn(x, t) of a class-conditional `model(x, t, y=...)`, for labels y (B,) and the paper's scale."""
    if scale == 0:
        return lambda x, t: model(x, t, y=y)
    both = torch.cat([y, torch.full_like(y, null_label)])  # (2B,)
    return lambda x, t: _combine(model(torch.cat([x, x]), torch.cat([t, t]), y=both), scale)


def text_guidance(model, context: Tensor, null_context: Tensor | None, scale: float) -> EpsFn:
    """eps_fn(x, t) of a text-conditional `model(x, t, context=...)`: context (B, T, C), null_context (T, C) of ""."""
    if scale == 0:
        return lambda x, t: model(x, t, context=context)
    both = torch.cat([context, null_context.to(context).expand_as(context)])  # (2B, T, C)
    return lambda x, t: _combine(model(torch.cat([x, x]), torch.cat([t, t]), context=both), scale)


def _combine(eps: Tensor, scale: float) -> Tensor:
    cond, uncond = eps.chunk(2)  # (B, C, H, W) each
    return cond + scale * (cond - uncond)
