"""x + MLP(LayerNorm(x)), the second half of a transformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import rows
from uvit_fast.kernels.runtime.op import Op, empty, is_last_backward


def reference(
    x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
) -> Tensor:
    """x + fc2(GELU(fc1(LayerNorm(x)))) with the exact (erf) GELU: x (..., D), w1 (4D, D), w2 (D, 4D) -> (..., D)."""
    h = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], gamma, beta, eps), w1, b1))  # (..., 4D)
    return x + F.linear(h, w2, b2)


def why_not(
    x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
) -> str | None:
    """Why the fused op cannot take these tensors; None where it can."""
    D, H = x.shape[-1], w1.shape[0]
    weights = {"gamma": (gamma, (D,)), "beta": (beta, (D,)), "w1": (w1, (H, D)), "b1": (b1, (H,))}
    reason = checks.why_not(x, weights | {"w2": (w2, (D, H)), "b2": (b2, (D,))})
    if reason is None and H % 64:
        return f"the hidden width {H} is no multiple of 64"
    return reason


def ln_mlp(
    x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
) -> Tensor:
    """The fused op, `reference` in two GEMMs: LayerNorm, bias and GELU in the first, bias and residual in the second.

    A tensor of shape (tokens, 4D) is written once, twice where a gradient is wanted: half the GELU's argument is kept for
    the backward, its value is computed again there, in its place. Saves x, the fp32 statistics and that half: 5 D a token.

    Args:
        x: (..., D), bf16 or fp16; every other tensor has its dtype.
        gamma, beta, b2: (D,).
        w1: (H, D), b1: (H,), w2: (D, H).

    Returns:
        (..., D).

    Raises:
        ValueError: with the sentence of `why_not`.
    """
    reason = why_not(x, gamma, beta, w1, b1, w2, b2, eps)
    if reason:
        raise ValueError(f"ln_mlp: {reason}")
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gamma, beta, w1, b1, w2, b2))
    return _op(x, gamma, beta, w1, b1, w2, b2, eps, save)[0]


def _forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return compute(x, gamma, beta, w1, b1, w2, b2, eps, save)


def compute(
    x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, save: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, which takes x's place with `overwrite`; the statistics; half the GELU's argument, empty unless `save` asks for it."""
    core, flat, moments = gemm.core(x.device), rows(x), layernorm.handed_on(x)
    stats, folded, offset = layernorm.prepare(flat, gamma, beta, rows(w1), b1, eps, moments, scale=0.5)
    act, h = core.linear_gelu(flat, folded, offset, stats=stats, save=save)  # (M, H)
    moments = layernorm.new_moments(flat, *flat.shape)
    y = core.linear(act, rows(w2), b2, residual=flat, overwrite=overwrite, moments=moments)  # (M, D)
    return layernorm.hand_on(y.view(x.shape), moments), stats, x.new_empty(0) if h is None else h


def _fake(x, gamma, beta, w1, b1, w2, b2, eps, save):
    M = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), layernorm.new_statistics(x, M), x.new_empty(M, w1.shape[0]) if save else x.new_empty(0)


def _backward(
    dy: Tensor, x: Tensor, stats: Tensor, h: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, w2: Tensor, last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    core, flat, dy = gemm.core(x.device), rows(x), rows(dy)
    da, act, db1 = core.linear_gelu_backward(dy, rows(w2), h, overwrite=last)  # (M, H), (M, H), (H,)
    dw2, _ = core.weight_gradient(dy, act, bias=False)  # (D, H)
    if last:  # autograd holds on to h, which is act by now, until this returns
        h.untyped_storage().resize_(0)
    del act
    g = core.input_gradient(da, rows(w1))  # (M, D)
    dx, normed, dgamma, dbeta, db2 = layernorm.backward(g, flat, stats, gamma, beta, dy)
    dw1, _ = core.weight_gradient(da, normed, bias=False)  # (H, D); fc1's bias came with da, fc2's with dx
    return dx.view(x.shape), dgamma, dbeta, dw1, db1, dw2, db2


def _fake_backward(dy, x, stats, h, gamma, beta, w1, w2, last):
    dx, dgamma, dbeta, dw1, dw2 = empty(x, gamma, beta, w1, w2)
    return dx, dgamma, dbeta, dw1, x.new_empty(w1.shape[0]), dw2, x.new_empty(w2.shape[0])


def _save(ctx, inputs, output):
    x, gamma, beta, w1, _, w2 = inputs[:6]
    ctx.set_materialize_grads(False)  # no zeros for the gradients of what only the backward reads
    ctx.save_for_backward(x, output[1], output[2], gamma, beta, w1, w2)


def _gradient(ctx, backward, dy, *_):
    return *backward(dy, *ctx.saved_tensors, is_last_backward(dy)), None, None


_op = Op("ln_mlp", _forward, _fake, _backward, _fake_backward, _save, _gradient)
