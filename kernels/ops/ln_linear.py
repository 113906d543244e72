"""Linear(LayerNorm(x)), without writing the normalised tensor."""

import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import rows
from uvit_fast.kernels.runtime.op import Op, empty


def reference(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension, then a linear layer: x (..., D), weight (N, D) -> (..., N)."""
    return F.linear(F.layer_norm(x, x.shape[-1:], gamma, beta, eps), weight, bias)


def why_not(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> str | None:
    """Why the fused op cannot take these tensors; None where it can."""
    N, D = weight.shape[0], x.shape[-1]
    weights = {"gamma": (gamma, (D,)), "beta": (beta, (D,)), "weight": (weight, (N, D)), "bias": (bias, (N,))}
    reason = checks.why_not(x, weights)
    if reason is None and N % 8:
        return f"the output's width {N} is no multiple of 8"
    return reason


def ln_linear(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The fused op, `reference` in one GEMM: rstd * (x @ V.T) + (bias + W @ beta), V = gamma * W less the mean of each row.

    V comes from a pass over W before it, the statistics from one over x in the same launch, or from the fused
    op that wrote x. Saves x and the fp32 statistics.

    Args:
        x: (..., D), bf16 or fp16; every other tensor has its dtype.
        gamma, beta: (D,).
        weight: (N, D), bias: (N,) or None.

    Returns:
        (..., N).

    Raises:
        ValueError: with the sentence of `why_not`.
    """
    reason = why_not(x, gamma, beta, weight, bias, eps)
    if reason:
        raise ValueError(f"ln_linear: {reason}")
    return _op(x, gamma, beta, weight, bias, eps, 1.0)[0]


def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """scale * Linear(LayerNorm(x)), of which whoever computes a fused MLP's first half again wants half; and the statistics."""
    flat, moments = rows(x), layernorm.handed_on(x)
    stats, folded, offset = layernorm.prepare(flat, gamma, beta, rows(weight), bias, eps, moments, scale)
    y = gemm.core(x.device).linear(flat, folded, offset, stats=stats)  # (M, N)
    return y.view(*x.shape[:-1], weight.shape[0]), stats


def _fake(x, gamma, beta, weight, bias, eps, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), layernorm.new_statistics(x, x.numel() // x.shape[-1])


def _backward(
    dy: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    core, flat, dy = gemm.core(x.device), rows(x), rows(dy)
    g = core.input_gradient(dy, rows(weight))  # (M, D)
    dx, normed, dgamma, dbeta = layernorm.backward(g, flat, stats, gamma, beta)
    dweight, dbias = core.weight_gradient(dy, normed, bias=has_bias)  # (N, D), (N,)
    return dx.view(x.shape), dgamma, dbeta, dweight, dy.new_empty(0) if dbias is None else dbias


def _fake_backward(dy, x, stats, gamma, beta, weight, has_bias):
    return *empty(x, gamma, beta, weight), x.new_empty(weight.shape[0] if has_bias else 0)


def _save(ctx, inputs, output):
    x, gamma, beta, weight, bias, _, scale = inputs
    assert scale == 1, "only what needs no gradient is scaled"
    ctx.set_materialize_grads(False)  # no zeros for the gradients of what only the backward reads
    ctx.save_for_backward(x, output[1], gamma, beta, weight)
    ctx.has_bias = bias is not None


def _gradient(ctx, backward, dy, _):
    x, stats, gamma, beta, weight = ctx.saved_tensors
    *grads, dbias = backward(dy, x, stats, gamma, beta, weight, ctx.has_bias)
    return *grads, dbias if ctx.has_bias else None, None, None


_op = Op("ln_linear", _forward, _fake, _backward, _fake_backward, _save, _gradient)
