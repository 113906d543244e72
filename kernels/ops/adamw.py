"""AdamW, the moving average of the weights and a copy in the network's dtype, in one pass over a rank's flat partition.

36 bytes per weight, where the gradient and the copy have 2: 18 GB for 500 million.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.device import interpreting
from uvit_fast.kernels.runtime.launch import cdiv


def factors(keep: Tensor, scale: Tensor, step: Tensor, betas: Tensor) -> Tensor:
    """Return the numbers that a step reads from the device: whether it happens, and the factors of gradient and
    corrections.

    Args:
        keep: () fp32, 1, or 0 if nothing may change; scale: () fp32.
        step: () fp32, the number of this step, from 1.
        betas: (2,) fp64.

    Returns:
        (4,) fp32: keep, scale, 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step).
    """
    left = 1 - betas ** step.double().clamp(min=1)  # (2,)
    return torch.stack([keep, scale, left[0].reciprocal().float(), left[1].rsqrt().float()])


class Partition(NamedTuple):
    """What a step reads and writes: contiguous tensors of one length."""

    weights: Tensor  # (n,) fp32, changed, as the next three
    exp_avg: Tensor  # (n,) fp32
    exp_avg_sq: Tensor  # (n,) fp32
    average: Tensor  # (n,) fp32, becomes decay * average + (1 - decay) * weights
    computed: Tensor  # (n,) of any float dtype, receives the new weights
    gradient: Tensor  # (n,) of any float dtype


class Settings(NamedTuple):
    """The numbers that stay the same from step to step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay: float  # of the moving average


def reference(part: Partition, numbers: Tensor, how: Settings) -> None:
    """Take one step in plain PyTorch (Loshchilov and Hutter 2019, Algorithm 2; the average: paper, Appendix).

    Args:
        numbers: from `factors`.
    """
    keep, scale, first, second = numbers.unbind()
    g = torch.where(keep > 0, part.gradient.float() * scale, 0)
    part.exp_avg.lerp_(g, (1 - how.betas[0]) * keep)
    part.exp_avg_sq.lerp_(g.square_(), (1 - how.betas[1]) * keep)
    part.weights.sub_(part.weights * (how.lr * how.weight_decay * keep))
    part.weights.sub_(part.exp_avg / (part.exp_avg_sq.sqrt() * second + how.eps) * (how.lr * first * keep))
    part.average.lerp_(part.weights, (1 - how.decay) * keep)
    part.computed.copy_(part.weights)


@triton.jit
def _adamw_kernel(
    weights,  # (n,) fp32, changed, as the next three
    exp_avg,
    exp_avg_sq,
    average,
    computed,  # (n,)
    gradient,  # (n,)
    numbers,  # (4,) fp32
    n,
    lr,
    rate1,  # 1 - beta1, by the host: in fp32 1 - 0.9999 is 0.0001 to 4 digits only; rate2, rate_average alike
    rate2,
    eps,
    weight_decay,
    rate_average,
    BLOCK: tl.constexpr,
):
    if tl.load(numbers) > 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(numbers + 1)
        p = tl.load(weights + at, mask=inside, other=0.0)
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        a = tl.load(average + at, mask=inside, other=0.0)
        m += rate1 * (g - m)
        v += rate2 * (g * g - v)
        p -= lr * weight_decay * p
        p -= tl.div_rn(m, tl.sqrt_rn(v) * tl.load(numbers + 3) + eps) * (lr * tl.load(numbers + 2))
        a += rate_average * (p - a)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        tl.store(weights + at, p, mask=inside)
        tl.store(average + at, a, mask=inside)
        tl.store(computed + at, p.to(computed.dtype.element_ty), mask=inside)


def adamw(part: Partition, numbers: Tensor, how: Settings) -> None:
    """Take the step of `reference`, on a GPU in one launch, elsewhere in plain PyTorch.

    Raises:
        ValueError: lengths that differ.
    """
    if len({t.numel() for t in part}) > 1:
        raise ValueError(f"adamw: expected tensors of one length, got {[t.numel() for t in part]}")
    device, n, block = part.weights.device, part.weights.numel(), 1024
    if device.type != "cuda" and not interpreting():
        return reference(part, numbers, how)
    args = (*part, numbers, n, how.lr, 1 - how.betas[0], 1 - how.betas[1], how.eps, how.weight_decay, 1 - how.decay)
    launch.run(device, _adamw_kernel, (cdiv(n, block),), args, {"BLOCK": block, "num_warps": 4})
