"""The backward of a LayerNorm, in one pass over the tokens. Plain Triton, for every architecture."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.layernorm.fold import split
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.reduce import totals


@triton.jit
def _columns(gamma, beta, col, D: tl.constexpr):
    """Return gamma and beta of these columns, and three sums at zero."""
    zero = tl.zeros(col.shape, tl.float32)
    scale = tl.load(gamma + col, mask=col < D, other=0.0).to(tl.float32)
    shift = tl.load(beta + col, mask=col < D, other=0.0).to(tl.float32)
    return scale, shift, zero, zero, zero


@triton.jit
def _fetch(g, x, dy, row, col, M, D: tl.constexpr, RESIDUAL: tl.constexpr):
    at = tl.cast(row, tl.int64) * D + col
    mask = (col < D) & (row < M)
    gv = tl.load(g + at, mask=mask, other=0.0)
    return gv, tl.load(x + at, mask=mask, other=0.0), tl.load(dy + at, mask=mask, other=0.0) if RESIDUAL else gv


@triton.jit
def _store(to, at, value, col, D: tl.constexpr):
    tl.store(to + at, value.to(to.dtype.element_ty), mask=col < D)


@triton.jit
def _keep(partial, dgamma, dbeta, passed, col, D: tl.constexpr, RESIDUAL: tl.constexpr):
    out = partial + tl.program_id(0) * 3 * D + col
    tl.store(out, dgamma, mask=col < D)
    tl.store(out + D, dbeta, mask=col < D)
    if RESIDUAL:
        tl.store(out + 2 * D, passed, mask=col < D)


@triton.jit
def _backward_kernel(
    g,  # (M, D): gradient of the normalised, affine output
    x,  # (M, D)
    dy,  # (M, D): gradient that passes the LayerNorm by, unread without RESIDUAL
    stats,  # (2, at least M) fp32: mean, rstd
    gamma,  # (D,)
    beta,  # (D,)
    dx,  # (M, D)
    normed,  # (M, D): LayerNorm(x), for the weight gradient
    partial,  # (programs, 3, D) fp32: sums of g * x_hat, of g, and of dy
    M,
    stride,  # of stats
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    pid = tl.program_id(0)
    lo = tl.arange(0, LO)
    hi = LO + tl.arange(0, HI if HI else 1)
    scale, shift, dgamma, dbeta, passed = _columns(gamma, beta, lo, D)
    g_next, x_next, dy_next = _fetch(g, x, dy, pid, lo, M, D, RESIDUAL)  # a row ahead of the one that is worked on
    if HI:
        scale2, shift2, dgamma2, dbeta2, passed2 = _columns(gamma, beta, hi, D)
        g_next2, x_next2, dy_next2 = _fetch(g, x, dy, pid, hi, M, D, RESIDUAL)
    for row in range(pid, M, tl.num_programs(0)):
        mean = tl.load(stats + row)
        rstd = tl.load(stats + stride + row)
        gv, hat, dyv = g_next.to(tl.float32), (x_next.to(tl.float32) - mean) * rstd, dy_next.to(tl.float32)
        g_next, x_next, dy_next = _fetch(g, x, dy, row + tl.num_programs(0), lo, M, D, RESIDUAL)
        c1 = tl.sum(gv * scale, axis=0)
        c2 = tl.sum(gv * scale * hat, axis=0)
        if HI:
            gv2, hat2, dyv2 = g_next2.to(tl.float32), (x_next2.to(tl.float32) - mean) * rstd, dy_next2.to(tl.float32)
            g_next2, x_next2, dy_next2 = _fetch(g, x, dy, row + tl.num_programs(0), hi, M, D, RESIDUAL)
            c1 += tl.sum(gv2 * scale2, axis=0)  # g is 0 outside
            c2 += tl.sum(gv2 * scale2 * hat2, axis=0)
        c1 /= D
        c2 /= D
        at = tl.cast(row, tl.int64) * D + lo
        d = rstd * (gv * scale - c1 - hat * c2)
        if RESIDUAL:
            d += dyv
        _store(dx, at, d, lo, D)
        _store(normed, at, hat * scale + shift, lo, D)
        dgamma += gv * hat
        dbeta += gv
        passed += dyv
        if HI:
            at2 = tl.cast(row, tl.int64) * D + hi
            d2 = rstd * (gv2 * scale2 - c1 - hat2 * c2)
            if RESIDUAL:
                d2 += dyv2
            _store(dx, at2, d2, hi, D)
            _store(normed, at2, hat2 * scale2 + shift2, hi, D)
            dgamma2 += gv2 * hat2
            dbeta2 += gv2
            passed2 += dyv2
    _keep(partial, dgamma, dbeta, passed, lo, D, RESIDUAL)
    if HI:
        _keep(partial, dgamma2, dbeta2, passed2, hi, D, RESIDUAL)


def backward(
    g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Compute LayerNorm's backward in one pass over the tokens.

    Args:
        g: (M, D), the gradient of LayerNorm(x).
        stats: from `prepare`.
        dy: (M, D), added to the gradient of x: the residual's gradient, which bypasses the LayerNorm.

    Returns:
        dx (M, D); LayerNorm(x) (M, D), which the weight gradient needs and the forward did not keep; the gradients of
        gamma and beta, (D,) each, and with dy its column sums (D,).
    """
    M, D = x.shape
    dx, normed = torch.empty_like(x), torch.empty_like(x)
    tuned = tuning.choice(x.device, "ln_backward", D)
    programs, (low, high) = min(M, tuned["programs"]), split(D)
    partial = x.new_empty(programs, 3, D, dtype=ACCUMULATE)
    args = (g, x, g if dy is None else dy, stats, gamma, beta, dx, normed, partial, M, stats.stride(0))
    options = {"D": D, "LO": low, "HI": high, "RESIDUAL": dy is not None, "num_warps": tuned["warps"]}
    launch.run(x.device, _backward_kernel, (programs,), args, options)
    return dx, normed, *totals(partial, 2 if dy is None else 3, x.dtype)
