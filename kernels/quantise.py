"""Linear layers in e4m3, derived from a network's own: weights, scales, and the order of features that a kernel leaves.

e4m3 is a floating-point format with three bits of mantissa: a value in [2^-6, 448] has a relative error of at most
1/16, wherever it lies, so a scale need only keep values in that range. A weight has one scale per row; the activations
at the input and output of a product have scale 1.
"""

import torch
from torch import Tensor

from uvit_fast.kernels.layers import Linear, Norm, Quantised
from uvit_fast.kernels.runtime.checks import ACCUMULATE

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def narrow(x: Tensor) -> Tensor:
    """Return x in e4m3, saturating, as cvt.rn.satfinite.e4m3x2.f32 does."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3)


def paired(features: int) -> Tensor:
    """Return the feature at each place of a result whose features are written in pairs: (features,) int64.

    A thread of the GEMM holds features i and i + 8 of each 16, and writes them side by side.
    """
    within = torch.tensor([i + 8 * half for i in range(8) for half in range(2)])
    return (torch.arange(0, features, 16)[:, None] + within).flatten()


def balanced(x: Tensor) -> Tensor:
    """Return x (N, K), whose rows sum to 0, in e4m3 with rows that sum to nearly 0.

    Some values are rounded to their other neighbour: first those that cost least, a value half way between two costing
    nothing, then the largest steps for which the remainder has room.
    """
    rounded = narrow(x)
    values, bits = rounded.float(), rounded.view(torch.uint8).to(torch.int16)
    off = values - x
    outwards = (off > 0) == (values < 0)
    bits = bits + torch.where(outwards, 1, -1)  # of the other neighbour
    step = bits.clamp(0, 255).to(torch.uint8).view(E4M3).float() - values
    step = torch.where((values != 0) & (bits & 127 != 127), step, 0)
    left = values.sum(1, keepdim=True)  # (N, 1)
    room = step.abs() * (step * left < 0)
    cost, order = torch.where(room > 0, step + 2 * off, torch.inf).abs().sort(1)  # of a unit
    taken = room.gather(1, order).cumsum(1).le(left.abs()) & cost.isfinite()
    taken = torch.zeros_like(taken).scatter(1, order, taken)
    for _ in range(16):
        left = values.sum(1, keepdim=True) + (step * taken).sum(1, keepdim=True)
        room = torch.where(~taken & (step * left < 0) & (step.abs() <= left.abs()), step.abs(), 0)
        most, where = room.max(1, keepdim=True)
        taken = taken.scatter(1, where, taken.gather(1, where) | (most > 0))
    return (values + step * taken).to(E4M3)


def quantise(linear: Linear, norm: Norm | None = None, scale: float = 1.0, order: Tensor | None = None) -> Quantised:
    """Return scale * Linear(LN(x)), or without a norm scale * Linear(x), as an e4m3 layer.

    As in `layernorm.fold`, each row of gamma W loses its mean, which LayerNorm subtracts from x anyway, and is
    `balanced`.

    Args:
        linear: weight (N, K), any float dtype.
        order: (K,) the feature of x at each place, K for a column of zeros; None: in order.
    """
    weight, bias = (None if t is None else t.detach().to(ACCUMULATE) for t in linear)
    shift = weight.new_zeros(weight.shape[0]) if bias is None else bias
    if norm is not None:
        shift = shift + weight @ norm.bias.detach().to(ACCUMULATE)
        weight = weight * norm.weight.detach().to(ACCUMULATE)
        weight = weight - weight.mean(1, keepdim=True)
    largest = weight.abs().amax(1).clamp(min=torch.finfo(ACCUMULATE).tiny * LARGEST)
    step = largest / LARGEST  # (N,)
    values = (narrow if norm is None else balanced)(weight / step[:, None])
    rows = torch.stack([shift * scale, step * scale])  # (2, N)
    if order is not None:
        values = torch.cat([values.float(), values.new_zeros(len(values), 1).float()], 1)[:, order.to(values.device)]
    return Quantised(values.to(E4M3).contiguous(), rows)


def two_sources(features: int, second: int, step: int) -> Tensor:
    """Return the order of a weight's columns for two sources of K: the second begins at a multiple of `step`."""
    padded = -(-features // step) * step
    gap = torch.full((padded - features,), features + second)
    return torch.cat([torch.arange(features), gap, torch.arange(features, features + second)])
