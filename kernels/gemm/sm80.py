"""The GEMM core in plain Triton: sm_80, any later architecture without a core of its own, and the interpreter on the CPU.

One kernel, out = epilogue(x @ w.T): the prologue picks the sources of K, the epilogue is composed of LayerNorm's fold, the bias,
GELU, its derivative and the residual. `gemm_hopper` has the same public functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.layernorm.fold import CHUNK
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime import reduce as sums
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.launch import cdiv

# GELU(2 h) = h + h tanh(v), v = h (G0 + w max(G1 + G2 w, 0)), w = h^2: within 2.6e-5 of the erf form, its derivative within 1.1e-4.
# The kernels take and keep h, half the argument: it costs no instruction, as the weights before it are halved. For |h| < 4e9, past which w^2 overflows.
G0 = tl.constexpr(1.5950157396197052)
G1 = tl.constexpr(0.2960452655195679)
G2 = tl.constexpr(-0.011248595984110748)

PLAIN, RESIDUAL, GELU, GELU_SAVE, GELU_BACKWARD = 0, 1, 2, 3, 4
CASES = ("gemm", "gemm_residual", "gemm_gelu", "gemm_gelu_save", "gemm_gelu_backward")  # mode -> its name in the tables


@triton.jit
def _gate(h):
    """(1 + tanh(v)) / 2 with GELU's v, and w."""
    w = h * h
    v = h * (w * tl.maximum(w * G2 + G1, 0.0) + G0)
    return 1.0 / (1.0 + tl.exp(-2.0 * v)), w


@triton.jit
def _accumulate(acc, x, w, row, col, M, N, K, stride_x, stride_wn, stride_wk, BK: tl.constexpr):
    """acc += x[row, :K] @ w[col, :K].T; K is a multiple of BK."""
    k = tl.arange(0, BK)
    xs = x + row.to(tl.int64)[:, None] * stride_x + k[None, :]
    ws = w + col[None, :] * stride_wn + k[:, None] * stride_wk
    for _ in range(0, K, BK):
        a = tl.load(xs, mask=(row < M)[:, None], other=0.0)
        b = tl.load(ws, mask=(col < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        xs += BK
        ws += BK * stride_wk
    return acc


@triton.jit
def gemm_kernel(
    x,  # (M, K)
    x2,  # (M, K2): the second source of the contraction, unread without DUAL
    w,  # (N, K + K2), by strides
    bias,  # (N,)
    stats,  # (2, at least M) fp32, whose second row, rstd, is read with FOLD
    side,  # (M, N): the residual, or GELU's h
    out,  # (M, N)
    out2,  # (M, N): GELU's h (GELU_SAVE), GELU's value (GELU_BACKWARD)
    partial,  # (ceil(M / BM), N) fp32: column sums of out (GELU_BACKWARD)
    moments,  # (N / 64, 2, M) fp32, written with MOMENTS: see layernorm.new_moments
    M,
    N,
    K,
    K2,
    stride_wn,
    stride_wk,
    stride_stats,
    FOLD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
    MODE: tl.constexpr,
    MOMENTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Tiles in groups of GROUP rows: the weight's columns stay in L2 while the group's rows pass.
    tiles_n = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
    inner = tl.program_id(0) % (GROUP * tiles_n)
    tile_m = group * GROUP + inner % height
    tile_n = inner // height
    row = tile_m * BM + tl.arange(0, BM)
    col = tile_n * BN + tl.arange(0, BN)

    acc = tl.zeros([BM, BN], tl.float32)
    acc = _accumulate(acc, x, w, row, col, M, N, K, K, stride_wn, stride_wk, BK)
    if DUAL:
        acc = _accumulate(acc, x2, w + K * stride_wk, row, col, M, N, K2, K2, stride_wn, stride_wk, BK)

    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    if FOLD:
        acc *= tl.load(stats + stride_stats + row, mask=row < M, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    if MODE == 1:
        acc += tl.load(side + at, mask=inside, other=0.0).to(tl.float32)
    elif MODE == 2 or MODE == 3:
        if MODE == 3:
            # The backward sees h as rounded: round before the GELU.
            kept = acc.to(out2.dtype.element_ty)
            tl.store(out2 + at, kept, mask=inside)
            acc = kept.to(tl.float32)
        phi, _ = _gate(acc)
        acc = 2.0 * acc * phi
    elif MODE == 4:
        h = tl.load(side + at, mask=inside, other=0.0).to(tl.float32)
        phi, w2 = _gate(h)
        tl.store(out2 + at, (2.0 * h * phi).to(out2.dtype.element_ty), mask=inside)
        slope = w2 * (w2 * (5.0 * G2) + 3.0 * G1) + G0
        acc = acc * (phi + 2.0 * h * phi * (1.0 - phi) * slope)
        total = tl.sum(tl.where(inside, acc, 0.0), axis=0)
        tl.store(partial + tile_m * N + col, total, mask=col < N)
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    if MOMENTS:
        chunks = tl.reshape(rounded.to(tl.float32), (BM, BN // CHUNK, CHUNK))
        total = tl.sum(chunks, axis=2)
        chunks -= (total * (1 / CHUNK))[:, :, None]
        chunk = tile_n * (BN // CHUNK) + tl.arange(0, BN // CHUNK)
        first = moments + chunk[None, :] * 2 * M + row[:, None]
        inside = (row < M)[:, None] & (chunk < N // CHUNK)[None, :]
        tl.store(first, total, mask=inside)
        tl.store(first + M, tl.sum(chunks * chunks, axis=2), mask=inside)


def outputs(mode: int, x: Tensor, N: int, side: Tensor | None, overwrite: bool) -> tuple[Tensor, Tensor]:
    """Where a GEMM of x (M, K) writes its one or two results (M, N): new memory, or with `overwrite` the side input's for the one
    that is computed from it value by value.
    """

    def new() -> Tensor:
        return x.new_empty(x.shape[0], N)

    if mode == RESIDUAL and overwrite:
        return side, side
    if mode == GELU_BACKWARD:
        return new(), side if overwrite else new()
    out = new()
    return out, new() if mode == GELU_SAVE else out


def _run(
    mode: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    x2: Tensor | None = None,
    stats: Tensor | None = None,
    side: Tensor | None = None,
    overwrite: bool = False,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel on x (M, K), w (N, K), which may be a transposed view."""
    (M, K), N = x.shape, w.shape[0]
    tuned = tuning.choice(x.device, CASES[mode], K)
    BM, BN, BK = tuned["tile"]
    out, out2 = outputs(mode, x, N, side, overwrite)
    partial = x.new_empty(cdiv(M, BM), N, dtype=ACCUMULATE) if mode == GELU_BACKWARD else out
    args = (
        x,
        x if x2 is None else x2,
        w,
        x if bias is None else bias,
        x if stats is None else stats,
        x if side is None else side,
        out,
        out2,
        partial,
        partial if moments is None else moments,
        M,
        N,
        K,
        0 if x2 is None else x2.shape[1],
        w.stride(0),
        w.stride(1),
        0 if stats is None else stats.stride(0),
    )
    options = {
        "FOLD": stats is not None,
        "HAS_BIAS": bias is not None,
        "DUAL": x2 is not None,
        "MODE": mode,
        "MOMENTS": moments is not None,
        "BM": BM,
        "BN": BN,
        "BK": BK,
        "GROUP": tuned["group"],
        "num_warps": tuned["warps"],
        "num_stages": tuned["stages"],
    }
    launch.run(x.device, gemm_kernel, (cdiv(M, BM) * cdiv(N, BN),), args, options)
    return out, out2, partial


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    stats: Tensor | None = None,
    residual: Tensor | None = None,
    overwrite: bool = False,
    moments: Tensor | None = None,
) -> Tensor:
    """x @ w.T + bias, with the sources and the epilogue that are given.

    Args:
        x: (M, K), contiguous.
        w: (N, K), or (N, K + K2) with x2; may be a transposed view.
        bias: (N,), any float dtype.
        x2: (M, K2): contracted with the last K2 columns of w.
        stats: of `layernorm.prepare`, as w and bias are: the LayerNorm of x is folded in.
        residual: (M, N), contiguous, added last.
        overwrite: the result takes the residual's place.
        moments: of `layernorm.new_moments`, filled with those of the result.

    Returns:
        (M, N) in x's dtype, accumulated in fp32.
    """
    return _run(PLAIN if residual is None else RESIDUAL, x, w, bias, x2, stats, residual, overwrite, moments)[0]


def linear_gelu(x: Tensor, w: Tensor, bias: Tensor, *, stats: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """GELU(2 h), h = LN(x) @ w.T + bias, with the LayerNorm folded in; h too where `save` asks for it. Both (M, N)."""
    act, pre, _ = _run(GELU_SAVE if save else GELU, x, w, bias, stats=stats)
    return act, pre if save else None


def linear_gelu_backward(dy: Tensor, w: Tensor, h: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Back through the linear layer after a GELU, and through the GELU.

    Args:
        dy: (M, K), the gradient of GELU(2 h) @ w.T.
        w: (K, N), that layer's weight.
        h: (M, N), half the GELU's argument.
        overwrite: GELU(2 h) takes h's place, each value that of the one it was computed from.

    Returns:
        The argument's gradient (dy @ w) * GELU'(2 h), (M, N); GELU(2 h), (M, N), which the weight gradient needs; the column sums of
        the first, (N,).
    """
    gradient, act, partial = _run(GELU_BACKWARD, dy, w.t(), side=h, overwrite=overwrite)
    return gradient, act, *sums.totals(partial, 1, dy.dtype)


def input_gradient(dy: Tensor, w: Tensor) -> Tensor:
    """dy @ w: (M, N), (N, K) -> (M, K). cuBLAS, as on every architecture where nothing measured faster."""
    return dy @ w


def weight_gradient(dy: Tensor, x: Tensor, *, bias: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """dy.T @ x, (N, K), and with `bias` the column sums of dy, (N,).

    Args:
        dy: (M, N); x: (M, K), contiguous.
        out: where the gradient goes, rows any distance apart; new memory without it.
    """
    out = dy.new_empty(dy.shape[1], x.shape[1]) if out is None else out
    torch.mm(dy.t(), x, out=out)
    return out, sums.column_sums(dy) if bias else None
