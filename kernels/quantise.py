"""Linear layers in e4m3, derived from a network's own: weights, scales, and the order of features that a kernel leaves.

e4m3 is a floating-point format with three bits of mantissa: a value in [2^-6, 448] has a relative error of at most
1/16, wherever it lies, so a scale need only keep values in that range. A weight has one scale per row; the activations
at the input and output of a product have scale 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uvit_fast.kernels.layers import Linear, Norm, Quantised
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.runtime.device import set_to

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
PANEL = 64  # columns whose errors are handed on together to those after them
DAMPING = 0.01  # of the mean square of an input, added to each: inputs that hardly occurred stay harmless


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


class Scaled(NamedTuple):
    """A linear layer before its weight is rounded to e4m3."""

    weight: Tensor  # (N, K) fp32, over the steps, columns in the order of its operand's features
    rows: Tensor  # (2, N) fp32: bias, step
    folded: bool  # whether a LayerNorm is folded in


class Inputs(NamedTuple):
    """What a layer's operand was over some tokens: of x in e4m3, times rstd where a LayerNorm is folded in."""

    tokens: int
    total: Tensor  # (K,) fp32
    products: Tensor  # (K, K) fp32, the sum of x x^T

    def plus(self, x: Tensor, rstd: Tensor | None) -> "Inputs":
        """Return these and those of x (M, K) e4m3 and rstd (M,) fp32.

        A GPU sums products of bf16, which holds e4m3 exactly, and rstd^2 e4m3 in two parts to 2^-17: TF32 would be a
        setting of the whole process.
        """
        wide = x.to(ACCUMULATE) if rstd is None else x.to(ACCUMULATE) * rstd.unsqueeze(1)
        products = self.products
        if x.device.type == "cuda":
            for part in [x.bfloat16()] if rstd is None else two_parts(wide * rstd.unsqueeze(1)):
                products = torch.addmm(products, part.t(), x.bfloat16(), out_dtype=ACCUMULATE)
        else:
            products = products.addmm(wide.t(), wide)
        return Inputs(self.tokens + len(x), self.total + wide.sum(0), products)


def two_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x, fp32, as two bf16 tensors whose sum it is to 2^-17 of itself."""
    large = x.bfloat16()
    return large, (x - large).bfloat16()


def unseen(features: int, device: torch.device) -> Inputs:
    """Return the inputs of no tokens."""
    zeros = torch.zeros(features + 1, features, device=device, dtype=ACCUMULATE)
    return Inputs(0, zeros[0], zeros[1:])


def scaled(linear: Linear, norm: Norm | None = None, scale: float = 1.0, order: Tensor | None = None) -> Scaled:
    """Return scale * Linear(LN(x)), or without a norm scale * Linear(x), over the steps of an e4m3 layer.

    As in `layernorm.fold`, each row of gamma W loses its mean, which LayerNorm subtracts from x anyway.

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
    rows = torch.stack([shift * scale, step * scale])  # (2, N)
    weight = weight / step[:, None]
    if order is not None:
        weight = torch.cat([weight, weight.new_zeros(len(weight), 1)], 1)[:, order.to(weight.device)]
    return Scaled(weight, rows, norm is not None)


def rounded(layer: Scaled) -> Quantised:
    """Round each weight by itself; the rows of one with a LayerNorm folded in are `balanced`."""
    return Quantised((balanced if layer.folded else narrow)(layer.weight).contiguous(), layer.rows)


def quantise(linear: Linear, norm: Norm | None = None, scale: float = 1.0, order: Tensor | None = None) -> Quantised:
    """Return the layer, `scaled` and `rounded`."""
    return rounded(scaled(linear, norm, scale, order))


def compensated(layers: Sequence[Scaled], inputs: Sequence[Inputs]) -> list[Quantised]:
    """Round layers of one shape so that their results change least for such inputs.

    Columns are rounded one after the other, each after what its own inputs tell of the errors so far is added to it:
    LDLQ ("QuIP", Chee et al. 2023, Section 3.1), which is OPTQ's rounding (Frantar et al. 2023, arXiv:2210.17323). The
    mean of what remains goes into the bias.
    """
    weights, K = torch.stack([layer.weight for layer in layers]), layers[0].weight.shape[1]  # (L, N, K)
    factors = torch.stack([_factor(each.products / each.tokens) for each in inputs])  # (L, K, K)
    left = torch.zeros_like(weights)  # by rounding
    with set_to(torch.backends.cuda.matmul, fp32_precision="ieee"):  # whatever the caller's is
        for start in range(0, K, PANEL):
            panel = slice(start, min(start + PANEL, K))
            wanted = weights[..., panel] + left[..., :start] @ factors[:, :start, panel]
            for k in range(panel.start, panel.stop):
                told = left[..., start:k] @ factors[:, start:k, k, None]  # (L, N, 1)
                value = narrow(wanted[..., k - start] + told[..., 0]).to(ACCUMULATE)
                torch.sub(weights[..., k], value, out=left[..., k])
    found = []
    for layer, value, error, (tokens, total, _) in zip(layers, narrow(weights - left), left, inputs):
        bias, step = layer.rows
        rows = torch.stack([bias + step * (error @ (total / tokens)), step])
        found.append(Quantised(value.clone(), rows))
    return found


def _factor(square: Tensor) -> Tensor:
    """Return the upper triangle U with ones on the diagonal of square = U D U^T, (K, K) fp32."""
    square = square.double()
    mean = square.diagonal().mean().clamp(min=torch.finfo(ACCUMULATE).tiny)  # inputs may all be 0
    square.diagonal().add_(DAMPING * mean)
    upper = torch.linalg.cholesky(square.flip(0, 1)).flip(0, 1)  # the lower triangle, turned around
    return (upper / upper.diagonal()).to(ACCUMULATE)


def two_sources(features: int, second: int, step: int) -> Tensor:
    """Return the order of a weight's columns for two sources of K: the second begins at a multiple of `step`."""
    padded = -(-features // step) * step
    gap = torch.full((padded - features,), features + second)
    return torch.cat([torch.arange(features), gap, torch.arange(features, features + second)])
