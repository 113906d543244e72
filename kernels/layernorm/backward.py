"""The backward of a LayerNorm, in one pass over the tokens. Plain Triton, for every architecture."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.layernorm.fold import ranges, split, total
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.reduce import totals


@triton.jit
def _vector(pointer, col, D: tl.constexpr):
    return tl.load(pointer + col, mask=col < D, other=0.0).to(tl.float32)


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
    cols = ranges(LO, HI)  # all tuples are over them
    scales, shifts, dgammas, dbetas, passed, ahead = (), (), (), (), (), ()
    for i in tl.static_range(len(cols)):
        scales, shifts = scales + (_vector(gamma, cols[i], D),), shifts + (_vector(beta, cols[i], D),)
        zero = (tl.zeros(cols[i].shape, tl.float32),)
        dgammas, dbetas, passed = dgammas + zero, dbetas + zero, passed + zero
        ahead = ahead + (_fetch(g, x, dy, pid, cols[i], M, D, RESIDUAL),)  # a row ahead of the one that is worked on
    for row in range(pid, M, tl.num_programs(0)):
        mean = tl.load(stats + row)
        rstd = tl.load(stats + stride + row)
        current, following, sums1, sums2 = (), (), (), ()
        for i in tl.static_range(len(cols)):
            gv, xv, dyv = ahead[i]
            gv, hat, dyv = gv.to(tl.float32), (xv.to(tl.float32) - mean) * rstd, dyv.to(tl.float32)
            current = current + ((gv, hat, dyv),)
            following = following + (_fetch(g, x, dy, row + tl.num_programs(0), cols[i], M, D, RESIDUAL),)
            sums1 = sums1 + (tl.sum(gv * scales[i], axis=0),)  # g is 0 outside
            sums2 = sums2 + (tl.sum(gv * scales[i] * hat, axis=0),)
        ahead = following
        c1, c2 = total(sums1) / D, total(sums2) / D
        dgamma, dbeta, dpassed = (), (), ()
        for i in tl.static_range(len(cols)):
            gv, hat, dyv = current[i]
            at = tl.cast(row, tl.int64) * D + cols[i]
            d = rstd * (gv * scales[i] - c1 - hat * c2)
            if RESIDUAL:
                d += dyv
            _store(dx, at, d, cols[i], D)
            _store(normed, at, hat * scales[i] + shifts[i], cols[i], D)
            dgamma, dbeta = dgamma + (dgammas[i] + gv * hat,), dbeta + (dbetas[i] + gv,)
            dpassed = dpassed + (passed[i] + dyv,)
        dgammas, dbetas, passed = dgamma, dbeta, dpassed
    for i in tl.static_range(len(cols)):
        out = partial + tl.program_id(0) * 3 * D + cols[i]
        _store(out, 0, dgammas[i], cols[i], D)
        _store(out, D, dbetas[i], cols[i], D)
        if RESIDUAL:
            _store(out, 2 * D, passed[i], cols[i], D)


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
    programs = min(M, tuned["programs"])
    partial = x.new_empty(programs, 3, D, dtype=ACCUMULATE)
    args = (g, x, g if dy is None else dy, stats, gamma, beta, dx, normed, partial, M, stats.stride(0))
    options = {**split(D), "RESIDUAL": dy is not None, "num_warps": tuned["warps"]}
    launch.run(x.device, _backward_kernel, (programs,), args, options)
    return dx, normed, *totals(partial, 2 if dy is None else 3, x.dtype)
