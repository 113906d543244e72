"""LayerNorm around a GEMM: what the folded forward needs before it, and the backward after it.

Plain Triton, for every architecture. Memory-bound: each kernel reads its inputs once.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.launch import cdiv
from uvit_fast.kernels.runtime.op import runs_eagerly
from uvit_fast.kernels.runtime.reduce import totals

CHUNK = tl.constexpr(64)  # features whose moments are taken together
TILE = 256  # statistics have room for a multiple of so many tokens: a GEMM reads them unmasked
MERGED = 32  # tokens whose statistics a program makes out of their moments


@functools.cache
def _split(D: int) -> tuple[int, int]:
    """D as a power of two and what covers the rest: 1152 = 1024 + 128 leaves no lane idle, 2048 would leave 44%."""
    low = 1 << (D.bit_length() - 1)
    return low, triton.next_power_of_2(D - low) if D > low else 0


@triton.jit
def _scaled(weight, gamma, beta, at, mask, col, scale, D: tl.constexpr):
    """Some columns of scale * gamma * weight, and of scale * weight @ beta the share of these columns."""
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gamma + col, mask=col < D, other=0.0).to(tl.float32) * scale
    b = tl.load(beta + col, mask=col < D, other=0.0).to(tl.float32) * scale
    return w * g[None, :], tl.sum(w * b[None, :], axis=1)


@triton.jit
def _rounded(w, centre, mask, dtype: tl.constexpr):
    """w - centre as rounded, of each row the sum and the sum of magnitudes."""
    w = tl.where(mask, w - centre[:, None], 0.0).to(dtype).to(tl.float32)
    return w, tl.sum(w, axis=1), tl.sum(tl.abs(w), axis=1)


@triton.jit
def _small(w, typical, mask):
    """Which values are below 1/16 of the row's mean magnitude: of a thousand normal ones forty."""
    return mask & (tl.abs(w) < typical[:, None] / 16)


@triton.jit
def _fold(weight, gamma, beta, bias, folded, offset, row, lo, hi, N, scale, D: tl.constexpr, HI: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Some rows of the weight, in columns `lo` and, with HI, `hi`: see `prepare`."""
    first = row.to(tl.int64)[:, None] * D
    mask = (row < N)[:, None] & (lo < D)[None, :]
    mask2 = (row < N)[:, None] & (hi < D)[None, :]
    w, shift = _scaled(weight, gamma, beta, first + lo[None, :], mask, lo, scale, D)
    centre = tl.sum(w, axis=1)
    if HI:
        w2, shift2 = _scaled(weight, gamma, beta, first + hi[None, :], mask2, hi, scale, D)
        centre += tl.sum(w2, axis=1)
        shift += shift2
    w, left, size = _rounded(w, centre / D, mask, folded.dtype.element_ty)
    if HI:
        w2, left2, size2 = _rounded(w2, centre / D, mask2, folded.dtype.element_ty)
        left += left2
        size += size2
    # Rounding leaves a sum, with which the mean of x would come through: the smallest weights, which are rounded least, take it up.
    small = _small(w, size / D, mask)
    count = tl.sum(small.to(tl.float32), axis=1)
    if HI:
        small2 = _small(w2, size / D, mask2)
        count += tl.sum(small2.to(tl.float32), axis=1)
    left = (left / tl.maximum(count, 1.0))[:, None]
    tl.store(folded + first + lo[None, :], tl.where(small, w - left, w).to(folded.dtype.element_ty), mask=mask)
    if HI:
        tl.store(folded + first + hi[None, :], tl.where(small2, w2 - left, w2).to(folded.dtype.element_ty), mask=mask2)
    if HAS_BIAS:
        shift += scale * tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(offset + row, shift, mask=row < N)


@triton.jit
def _prepare_kernel(
    x,  # (M, D)
    gamma,  # (D,)
    beta,  # (D,)
    weight,  # (N, D)
    bias,  # (N,), unread without HAS_BIAS
    stats,  # (2, at least M) fp32: mean, rstd
    folded,  # (N, D): scale * gamma * weight, centred: its rows sum up to 0
    offset,  # (N,) fp32: scale * (bias + weight @ beta)
    moments,  # (D / 64, 2, M) fp32, read with MOMENTS in the place of x
    M,
    N,
    stride,  # of stats
    scale,
    eps,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    pid = tl.program_id(0)
    weight_programs = tl.cdiv(N, ROWS)
    lo = tl.arange(0, LO)
    hi = LO + tl.arange(0, HI if HI else 1)
    if pid < weight_programs:
        row = pid * ROWS + tl.arange(0, ROWS)
        _fold(weight, gamma, beta, bias, folded, offset, row, lo, hi, N, scale, D, HI, HAS_BIAS)
    elif MOMENTS:
        token = (pid - weight_programs) * TOKENS + tl.arange(0, TOKENS)
        chunk = tl.arange(0, MOMENTS)
        where = chunk[:, None] * 2 * M + token[None, :]
        known = (chunk < D // CHUNK)[:, None] & (token < M)[None, :]
        summed = tl.load(moments + where, mask=known, other=0.0)
        squares = tl.load(moments + M + where, mask=known, other=0.0)
        mean = tl.sum(summed, axis=0) / D
        apart = tl.where(known, summed / CHUNK - mean[None, :], 0.0)  # a chunk's mean from that of all
        variance = tl.sum(squares + CHUNK * apart * apart, axis=0)
        tl.store(stats + token, mean, mask=token < M)
        tl.store(stats + stride + token, 1.0 / tl.sqrt(variance / D + eps), mask=token < M)
    else:
        row = (pid - weight_programs) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * D
        inside = (row < M)[:, None]
        a = tl.load(x + at + lo[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(a, axis=1)
        if HI:
            b = tl.load(x + at + hi[None, :], mask=inside & (hi < D)[None, :], other=0.0).to(tl.float32)
            mean += tl.sum(b, axis=1)
        mean = mean / D
        a -= mean[:, None]
        variance = tl.sum(a * a, axis=1)  # of the centred values: exact for any mean
        if HI:
            b = tl.where((hi < D)[None, :], b - mean[:, None], 0.0)
            variance += tl.sum(b * b, axis=1)
        tl.store(stats + row, mean, mask=row < M)
        tl.store(stats + stride + row, 1.0 / tl.sqrt(variance / D + eps), mask=row < M)


_kept: ContextVar[dict[tuple, tuple[Tensor, Tensor]] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def folded_once() -> Iterator[None]:
    """While open, a weight is folded at its first `prepare` and kept until the end: it must not change meanwhile."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def new_moments(like: Tensor, M: int, D: int) -> Tensor | None:
    """Where a GEMM whose result (M, D) is handed on puts what a LayerNorm's statistics follow from, on the way: for every 64 features
    of a token their sum, and the sum of their squared distances from their mean. (D / 64, 2, M) fp32; None where nobody could take
    them, or a change would go unseen, as inference mode does not count them.
    """
    if D % CHUNK.value or not runs_eagerly() or torch.is_inference_mode_enabled():
        return None
    return like.new_empty(D // CHUNK.value, 2, M, dtype=ACCUMULATE)


def hand_on(y: Tensor, moments: Tensor | None) -> Tensor:
    """y, which knows its moments until somebody takes them or changes it."""
    if moments is not None:
        y.moments = moments, y._version
    return y


def handed_on(x: Tensor) -> Tensor | None:
    """The moments of x where the op that wrote it left them; whoever asks first takes them, so that they do not live as long as x."""
    moments, version = vars(x).pop("moments", (None, None))
    return moments if moments is not None and version == x._version else None


def new_statistics(x: Tensor, M: int) -> Tensor:
    """Where the mean and rstd of M tokens go, (2, M rounded up to a multiple of TILE) fp32."""
    return x.new_empty(2, cdiv(M, TILE) * TILE, dtype=ACCUMULATE)


def prepare(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, moments: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Row statistics of x and the weight with the LayerNorm folded in, in one launch; within `folded_once` the statistics alone, from
    the second time on.

    scale * Linear(LN(x)) = rstd * (x @ folded.T) + offset: as LayerNorm takes the mean off x, the same number may be taken off every
    weight of a row, and with weights that sum up to 0 the mean of x no longer matters.

    Args:
        moments: of x, if its writer left them: x is not read then.
        scale: a power of two, which rounds nothing.

    Returns:
        stats (2, at least M) fp32 (mean, rstd), of `new_statistics`; folded (N, D); offset (N,) fp32.
    """
    (M, D), N = x.shape, weight.shape[0]
    stats = new_statistics(x, M)
    kept = _kept.get()
    key = (weight.shape, scale, *(t if t is None else t.data_ptr() for t in (gamma, beta, weight, bias)))
    if kept is not None and key in kept:
        (folded, offset), N = kept[key], 0
    else:
        folded = torch.empty_like(weight, memory_format=torch.contiguous_format)
        offset = x.new_empty(N, dtype=ACCUMULATE)
        if kept is not None:
            kept[key] = folded, offset
    tuned = tuning.choice(x.device, "prepare", D)
    low, high = _split(D)
    tokens = tuned["rows"] if moments is None else MERGED
    grid = (cdiv(N, tuned["rows"]) + cdiv(M, tokens),)
    args = (x, gamma, beta, weight, x if bias is None else bias, stats, folded, offset)
    args += (stats if moments is None else moments, M, N, stats.stride(0), scale, eps)
    options = {
        "D": D,
        "LO": low,
        "HI": high,
        "HAS_BIAS": bias is not None,
        "MOMENTS": 0 if moments is None else triton.next_power_of_2(moments.shape[0]),
        "ROWS": tuned["rows"],
        "TOKENS": MERGED,
        "num_warps": tuned["warps"],
    }
    launch.run(x.device, _prepare_kernel, grid, args, options)
    return stats, folded, offset


@triton.jit
def _columns(gamma, beta, col, D: tl.constexpr):
    """gamma and beta of these columns, and three sums at zero."""
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
def _store(dx, normed, gv, hat, dyv, scale, shift, rstd, c1, c2, row, col, D: tl.constexpr, RESIDUAL: tl.constexpr):
    at = tl.cast(row, tl.int64) * D + col
    d = rstd * (gv * scale - c1 - hat * c2)
    if RESIDUAL:
        d += dyv
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=col < D)
    tl.store(normed + at, (hat * scale + shift).to(normed.dtype.element_ty), mask=col < D)


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
        _store(dx, normed, gv, hat, dyv, scale, shift, rstd, c1, c2, row, lo, D, RESIDUAL)
        dgamma += gv * hat
        dbeta += gv
        passed += dyv
        if HI:
            _store(dx, normed, gv2, hat2, dyv2, scale2, shift2, rstd, c1, c2, row, hi, D, RESIDUAL)
            dgamma2 += gv2 * hat2
            dbeta2 += gv2
            passed2 += dyv2
    _keep(partial, dgamma, dbeta, passed, lo, D, RESIDUAL)
    if HI:
        _keep(partial, dgamma2, dbeta2, passed2, hi, D, RESIDUAL)


def backward(
    g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Back through LayerNorm in one pass over the tokens.

    Args:
        g: (M, D), the gradient of LayerNorm(x).
        stats: as `prepare` wrote them.
        dy: (M, D), added to the gradient of x: the residual's way around the LayerNorm.

    Returns:
        dx (M, D); LayerNorm(x) (M, D), which the weight gradient needs and nobody kept; the gradients of gamma and beta, (D,)
        each, and with dy its column sums (D,).
    """
    M, D = x.shape
    dx, normed = torch.empty_like(x), torch.empty_like(x)
    tuned = tuning.choice(x.device, "ln_backward", D)
    programs, (low, high) = min(M, tuned["programs"]), _split(D)
    partial = x.new_empty(programs, 3, D, dtype=ACCUMULATE)
    args = (g, x, g if dy is None else dy, stats, gamma, beta, dx, normed, partial, M, stats.stride(0))
    options = {"D": D, "LO": low, "HI": high, "RESIDUAL": dy is not None, "num_warps": tuned["warps"]}
    launch.run(x.device, _backward_kernel, (programs,), args, options)
    return dx, normed, *totals(partial, 2 if dy is None else 3, x.dtype)
