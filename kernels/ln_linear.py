"""Linear(LayerNorm(x)), without writing the normalised tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch, layernorm


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
    reason = launch.why_not(x, weights)
    if reason is None and N % 8:
        return f"the output's width {N} is no multiple of 8"
    return reason


def ln_linear(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The fused op, `reference` in one GEMM: rstd * (x @ (gamma * W).T - mean * sums) + (bias + W @ beta).

    The statistics, gamma * W and its row sums come from one pass over x and W before it. Saves x and the fp32 statistics.

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
    return _forward(x, gamma, beta, weight, bias, eps)[0]


@torch.library.custom_op("uvit_fast::ln_linear", mutates_args=())
def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    flat = launch.rows(x)
    stats, folded, sums, offset = layernorm.prepare(flat, gamma, beta, launch.rows(weight), bias, eps)
    y = launch.core(x.device).linear(flat, folded, offset, fold=(stats, sums))  # (M, N)
    return y.view(*x.shape[:-1], weight.shape[0]), stats


@_forward.register_fake
def _(x, gamma, beta, weight, bias, eps):
    stats = x.new_empty(2, x.numel() // x.shape[-1], dtype=launch.ACCUMULATE)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), stats


@torch.library.custom_op("uvit_fast::ln_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    core, flat, dy = launch.core(x.device), launch.rows(x), launch.rows(dy)
    g = core.input_gradient(dy, launch.rows(weight))  # (M, D)
    dx, normed, sums = layernorm.backward(g, flat, stats, gamma, beta)
    dweight, dbias = core.weight_gradient(dy, normed, bias=has_bias)  # (N, D), (N,)
    dbias = dy.new_empty(0) if dbias is None else dbias.to(x.dtype)
    dgamma, dbeta = (s.to(x.dtype, copy=True) for s in sums)
    return dx.view(x.shape), dgamma, dbeta, dweight, dbias


@_backward.register_fake
def _(dy, x, stats, gamma, beta, weight, has_bias):
    new = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gamma, beta, weight)]
    return *new, x.new_empty(weight.shape[0] if has_bias else 0)


def _setup(ctx, inputs, output):
    x, gamma, beta, weight, bias, _ = inputs
    ctx.save_for_backward(x, output[1], gamma, beta, weight)
    ctx.has_bias = bias is not None


def _autograd(ctx, dy, _):
    x, stats, gamma, beta, weight = ctx.saved_tensors
    *grads, dbias = _backward(dy, x, stats, gamma, beta, weight, ctx.has_bias)
    return *grads, dbias if ctx.has_bias else None, None


_forward.register_autograd(_autograd, setup_context=_setup)
