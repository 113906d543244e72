"""LayerNorm folded into the linear layer after it: the row statistics, and the weight with gamma and beta in it.

Plain Triton, for every architecture. Memory-bound: each kernel reads its inputs once.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.layernorm.sums import CHUNK, WIDEST, Summed
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.runtime import launch, once, program, tuning
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.launch import cdiv

FEATURES: tl.constexpr = tl.constexpr(CHUNK)  # features per sum
EPS = 1e-5  # of every LayerNorm whose statistics are taken apart from its fold
MERGED = 32  # tokens whose statistics one program computes from their sums


@functools.cache
def split(D: int) -> dict[str, int]:
    """Return D as a power of two, LO, and one that covers the rest, HI: 1152 = 1024 + 128 idles no lane, 2048 would
    idle 44%.
    """
    low = 1 << (D.bit_length() - 1)
    return {"D": D, "LO": low, "HI": triton.next_power_of_2(D - low) if D > low else 0}


@triton.jit
def ranges(LO: tl.constexpr, HI: tl.constexpr):
    """Return the columns of a row, a tuple of one or two ranges: see `split`. All tuples here are over them."""
    cols = (tl.arange(0, LO),)
    if HI:
        cols = (cols[0], LO + tl.arange(0, HI))
    return cols


@triton.jit
def total(xs):
    """Return the sum of a tuple."""
    y = xs[0]
    for i in tl.static_range(1, len(xs)):
        y += xs[i]
    return y


@triton.jit
def fold_rows(layer, results, row, cols, N, scale, D: tl.constexpr, HAS_BIAS):
    """Fold the norm into some rows of the weight: see `prepare`."""
    weight, gamma, beta, bias = layer
    folded, offset = results
    first = row.to(tl.int64)[:, None] * D
    masks = [(row < N)[:, None] & (col < D)[None, :] for col in cols]
    ws, sums, shifts = (), (), ()
    for i in tl.static_range(len(cols)):  # scale * gamma * weight, and scale * weight @ beta
        w = tl.load(weight + (first + cols[i][None, :]), mask=masks[i], other=0.0).to(tl.float32)
        g = tl.load(gamma + cols[i], mask=cols[i] < D, other=0.0).to(tl.float32) * scale
        b = tl.load(beta + cols[i], mask=cols[i] < D, other=0.0).to(tl.float32) * scale
        scaled, shift = w * g[None, :], tl.sum(w * b[None, :], axis=1)
        ws, sums, shifts = ws + (scaled,), sums + (tl.sum(scaled, axis=1),), shifts + (shift,)
    centre, shift = total(sums) / D, total(shifts)
    near, lefts, sizes = (), (), ()
    for i in tl.static_range(len(cols)):  # as rounded
        w = tl.where(masks[i], ws[i] - centre[:, None], 0.0).to(folded.dtype.element_ty).to(tl.float32)
        near, lefts, sizes = near + (w,), lefts + (tl.sum(w, axis=1),), sizes + (tl.sum(tl.abs(w), axis=1),)
    # Rounding leaves a sum, through which the mean of x would show: the smallest weights, rounded least, take it up:
    # those below 1/16 of the row's mean magnitude, forty in a thousand normal ones.
    typical = total(sizes) / D
    smalls, counts = (), ()
    for i in tl.static_range(len(cols)):
        small = masks[i] & (tl.abs(near[i]) < typical[:, None] / 16)
        smalls, counts = smalls + (small,), counts + (tl.sum(small.to(tl.float32), axis=1),)
    left = (total(lefts) / tl.maximum(total(counts), 1.0))[:, None]
    for i in tl.static_range(len(cols)):
        w = tl.where(smalls[i], near[i] - left, near[i])
        tl.store(folded + first + cols[i][None, :], w.to(folded.dtype.element_ty), mask=masks[i])
    if HAS_BIAS:
        shift += scale * tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(offset + row, shift, mask=row < N)


@triton.jit
def write_statistics(xs, cols, stats, stride, row, M, eps, D: tl.constexpr):
    """Write mean and rstd of rows of D values, fp32."""
    mean = total([tl.sum(x, axis=1) for x in xs]) / D
    squares = ()
    for i in tl.static_range(len(xs)):  # of the centred values: exact for any mean
        x = xs[i] - mean[:, None]
        if i > 0:
            x = tl.where((cols[i] < D)[None, :], x, 0.0)
        squares = squares + (tl.sum(x * x, axis=1),)
    tl.store(stats + row, mean, mask=row < M)
    tl.store(stats + stride + row, 1.0 / tl.sqrt(total(squares) / D + eps), mask=row < M)


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
    sums,  # (D / 64, 2, M) fp32, read with SUMS in the place of x
    narrow,  # (M, D) e4m3, written with NARROW: x
    M,
    N,
    stride,  # of stats
    scale,
    eps,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,  # D / 64, up to a power of two
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    pid = tl.program_id(0)
    weight_programs = tl.cdiv(N, ROWS)
    cols = ranges(LO, HI)
    if pid < weight_programs:
        row = pid * ROWS + tl.arange(0, ROWS)
        fold_rows((weight, gamma, beta, bias), (folded, offset), row, cols, N, scale, D, HAS_BIAS)
    elif SUMS:
        token = (pid - weight_programs) * TOKENS + tl.arange(0, TOKENS)
        chunk = tl.arange(0, SUMS)
        where = chunk[:, None] * 2 * M + token[None, :]
        known = (chunk < D // FEATURES)[:, None] & (token < M)[None, :]
        summed = tl.load(sums + where, mask=known, other=0.0)
        squares = tl.load(sums + M + where, mask=known, other=0.0)
        mean = tl.sum(summed, axis=0) / D
        apart = tl.where(known, summed / FEATURES - mean[None, :], 0.0)  # a chunk's mean from that of all
        variance = tl.sum(squares + FEATURES * apart * apart, axis=0)
        tl.store(stats + token, mean, mask=token < M)
        tl.store(stats + stride + token, 1.0 / tl.sqrt(variance / D + eps), mask=token < M)
    else:
        row = (pid - weight_programs) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * D
        xs = ()
        for i in tl.static_range(len(cols)):
            inside = (row < M)[:, None]
            if i > 0:
                inside = inside & (cols[i] < D)[None, :]
            value = tl.load(x + at + cols[i][None, :], mask=inside, other=0.0).to(tl.float32)
            if NARROW:
                tl.store(narrow + at + cols[i][None, :], value.to(narrow.dtype.element_ty), mask=inside)
            xs = xs + (value,)
        write_statistics(xs, cols, stats, stride, row, M, eps, D)


@contextlib.contextmanager
def folded_once() -> Iterator[None]:
    """Fold each weight once, at its first `prepare`, and keep it until the end: weights must not change meanwhile."""
    with program.suspended(), once.stretch({}):
        yield


def new_statistics(x: Tensor, M: int) -> Tensor:
    """Return memory for the mean and rstd of M tokens, (2, M and a tile more, a multiple of 16) fp32."""
    return x.new_empty(2, cdiv(M + WIDEST, 16) * 16, dtype=ACCUMULATE)


def statistics(x: Tensor, sums: Tensor | None = None, narrow: Tensor | None = None) -> Tensor:
    """Return mean and rstd of each row of x (M, D), (2, at least M) fp32.

    Args:
        sums: of x, if the kernel that wrote it left them: then x is not read.
        narrow: (M, D) e4m3, filled with x in the same pass; without sums.
    """
    stats = new_statistics(x, x.shape[0])
    _launch(x, (stats,) * 4, (stats, stats), stats, sums, (0, x.shape[0]), 1.0, EPS, narrow)
    return stats


def _launch(
    x: Tensor,
    layer: tuple[Tensor, ...],
    folded: tuple[Tensor, Tensor],
    stats: Tensor,
    sums: Tensor | None,
    rows: tuple[int, int],
    scale: float,
    eps: float,
    narrow: Tensor | None = None,
) -> None:
    """Run the kernel over `rows` of the layer (gamma, beta, weight and bias), and of x or its sums."""
    (N, M), D = rows, x.shape[1]
    gamma, beta, weight, bias = layer
    tuned = tuning.choice(x.device, "prepare", D)
    grid = (cdiv(N, tuned["rows"]) + cdiv(M, tuned["rows"] if sums is None else MERGED),)
    args = (x, gamma, beta, weight, x if bias is None else bias, stats, *folded)
    args += (stats if sums is None else sums, stats if narrow is None else narrow)
    args += (M, N, stats.stride(0), scale, eps)
    options = {
        **split(D),
        "HAS_BIAS": bias is not None,
        "SUMS": 0 if sums is None else triton.next_power_of_2(sums.shape[0]),
        "NARROW": narrow is not None,
        "ROWS": tuned["rows"],
        "TOKENS": MERGED,
        "num_warps": tuned["warps"],
        "enable_fp_fusion": False,  # or the bits of a fold would be the compiler's choice: `refold` makes the same
    }
    launch.run(x.device, _prepare_kernel, grid, args, options)


class Folded(NamedTuple):
    """A linear layer with the preceding LayerNorm folded in: scale * Linear(LN(x)) = rstd * (x @ weight.T) + bias."""

    linear: Linear  # weight (N, D) in x's dtype, whose rows sum up to 0, and bias (N,) fp32
    stats: Tensor | Summed  # (2, at least M) fp32: mean, rstd; or the sums from which the product computes rstd


class Kept(NamedTuple):
    """A linear layer of `Folded` that is kept, and what it was folded from."""

    folded: Linear
    layer: tuple[Tensor, Tensor, Tensor, Tensor | None]  # gamma, beta, weight, bias
    scale: float


def prepare(
    x: Tensor, norm: Norm, linear: Linear, sums: Tensor | None = None, scale: float = 1.0, measured: bool = True
) -> Folded:
    """Return the row statistics of x and the weight with the LayerNorm folded in, in at most one launch.

    Where a stretch keeps weights (`runtime.once`), the first call folds one; later ones compute the statistics alone.

    As LayerNorm subtracts the mean of x, the same number may be subtracted from every weight of a row, and with weights
    that sum to 0 the mean of x no longer matters.

    Args:
        x: (M, D); norm, linear: the layers that follow.
        sums: of x, if the kernel that wrote it left them: then x is not read.
        scale: a power of two, which rounds nothing.
        measured: whether the statistics are needed; otherwise, if there are sums, the product computes rstd from them.
    """
    (weight, bias), M, N = linear, x.shape[0], linear.weight.shape[0]
    kept, layer = once.kept(), (norm.weight, norm.bias, weight, bias)
    key = (weight.shape, scale, *(t if t is None else t.data_ptr() for t in layer))
    if kept is not None and key in kept:
        folded, N = kept[key].folded, 0
    else:
        made = torch.empty_like(weight, memory_format=torch.contiguous_format)
        folded = Linear(made, x.new_empty(N, dtype=ACCUMULATE))
        if kept is not None:
            kept[key] = Kept(folded, layer, scale)
    summed = sums is not None and not measured
    stats = Summed(sums, norm.eps) if summed else new_statistics(x, M)
    if N or not summed:
        rows = N, 0 if summed else M
        _launch(x, layer, folded, sums if summed else stats, sums, rows, scale, norm.eps)
    return Folded(folded, stats)
