"""The linear layer over concatenated skips, without the concatenation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import rows
from uvit_fast.kernels.runtime.op import Op, empty


def reference(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear(Concat(x, skip)): x, skip (..., D), weight (N, 2D) -> (..., N)."""
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


def why_not(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the fused op cannot take these tensors; None where it can."""
    N, D = weight.shape[0], x.shape[-1]
    weights = {"skip": (skip, tuple(x.shape)), "weight": (weight, (N, 2 * D)), "bias": (bias, (N,))}
    reason = checks.why_not(x, weights)
    if reason is None and N % 8:
        return f"the output's width {N} is no multiple of 8"
    return reason


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The fused op: one accumulator over two ranges of K, and gradients that go straight into their tensors.

    Args:
        x, skip: (..., D), bf16 or fp16; every other tensor has their dtype.
        weight: (N, 2D), bias: (N,).

    Returns:
        (..., N).

    Raises:
        ValueError: with the sentence of `why_not`.
    """
    reason = why_not(x, skip, weight, bias)
    if reason:
        raise ValueError(f"skip_linear: {reason}")
    return _op(x, skip, weight, bias)


def _forward(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layernorm.handed_on(x)  # no LayerNorm reads x
    flat, N = rows(x), weight.shape[0]
    moments = layernorm.new_moments(flat, flat.shape[0], N)
    y = gemm.core(x.device).linear(flat, rows(weight), bias, x2=rows(skip), moments=moments)  # (M, N)
    return layernorm.hand_on(y.view(*x.shape[:-1], N), moments)


def _fake(x, skip, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward(dy: Tensor, x: Tensor, skip: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    core, dy, D = gemm.core(x.device), rows(dy), x.shape[-1]
    halves = [slice(i * D, (i + 1) * D) for i in range(2)]
    wide = rows(weight)
    dx, dskip = (core.input_gradient(dy, wide[:, half]) for half in halves)  # (M, D)
    dweight = torch.empty_like(wide)  # (N, 2D), each half written where it belongs
    _, dbias = core.weight_gradient(dy, rows(x), bias=True, out=dweight[:, halves[0]])
    core.weight_gradient(dy, rows(skip), bias=False, out=dweight[:, halves[1]])
    return dx.view(x.shape), dskip.view(x.shape), dweight, dbias


def _fake_backward(dy, x, skip, weight):
    return *empty(x, skip, weight), x.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx, backward, dy):
    return backward(dy, *ctx.saved_tensors)


_op = Op("skip_linear", _forward, _fake, _backward, _fake_backward, _save, _gradient)
