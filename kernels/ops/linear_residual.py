"""A linear layer with the residual added in its epilogue: attention's output projection."""

import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import rows
from uvit_fast.kernels.runtime.op import Op, empty


def reference(a: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x + Linear(a): a (..., K), weight (D, K), x (..., D) -> (..., D)."""
    return x + F.linear(a, weight, bias)


def why_not(a: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> str | None:
    """Why the fused op cannot take these tensors; None where it can."""
    D, K = weight.shape[0], a.shape[-1]
    weights = {"weight": (weight, (D, K)), "bias": (bias, (D,)), "x": (x, (*a.shape[:-1], D))}
    reason = checks.why_not(a, weights)
    if reason is None and D % 8:
        return f"the output's width {D} is no multiple of 8"
    return reason


def linear_residual(a: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The fused op: `reference` in one GEMM.

    Args:
        a: (..., K), bf16 or fp16; every other tensor has its dtype.
        weight: (D, K), bias: (D,).
        x: (..., D), the residual.

    Returns:
        (..., D).

    Raises:
        ValueError: with the sentence of `why_not`.
    """
    reason = why_not(a, weight, bias, x)
    if reason:
        raise ValueError(f"linear_residual: {reason}")
    return _op(a, weight, bias, x)


def _forward(a: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    core, flat = gemm.core(a.device), rows(x)
    moments = layernorm.new_moments(flat, *flat.shape)
    y = core.linear(rows(a), rows(weight), bias, residual=flat, moments=moments)  # (M, D)
    return layernorm.hand_on(y.view(x.shape), moments)


def _fake(a, weight, bias, x):
    return x.new_empty(x.shape)


def _backward(dy: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    core, dy = gemm.core(a.device), rows(dy)
    da = core.input_gradient(dy, rows(weight))  # (M, K)
    dweight, dbias = core.weight_gradient(dy, rows(a), bias=True)  # (D, K), (D,)
    return da.view(a.shape), dweight, dbias


def _fake_backward(dy, a, weight):
    return *empty(a, weight), a.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _gradient(ctx, backward, dy):
    return *backward(dy, *ctx.saved_tensors), dy


_op = Op("linear_residual", _forward, _fake, _backward, _fake_backward, _save, _gradient)
