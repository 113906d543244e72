"""The GEMM core in plain Triton: for sm_80, later architectures without their own core, and the interpreter.

One kernel, out = epilogue(x @ w.T): one or two sources of K, then LayerNorm's scale, the bias and the epilogue.
"""

import triton
import triton.language as tl

from uvit_fast.kernels.gemm.contract import CASES, G0, G1, G2, Call, Core, Product, results
from uvit_fast.kernels.layernorm.sums import CHUNK
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.launch import cdiv

FEATURES: tl.constexpr = tl.constexpr(CHUNK)  # whose sums are taken together


@triton.jit
def _gate(h):
    """Return (1 + tanh(v)) / 2 with GELU's v, and w."""
    w = h * h
    v = h * (w * tl.maximum(w * G2 + G1, 0.0) + G0)
    return 1.0 / (1.0 + tl.exp(-2.0 * v)), w


@triton.jit
def _gelu_slope(h, phi, w):
    """Return GELU'(2 h) from `_gate`'s results."""
    slope = w * (w * (5.0 * G2) + 3.0 * G1) + G0
    return phi + 2.0 * h * phi * (1.0 - phi) * slope


@triton.jit
def _accumulate(acc, xs, ws, rows, cols, K, stride, BK: tl.constexpr):
    """Return acc + x @ w.T.

    `xs` points to the first BK columns of x's rows, `ws` to those of w's, `stride` apart; K is a multiple of BK.
    """
    for _ in range(0, K, BK):
        a = tl.load(xs, mask=rows, other=0.0)
        b = tl.load(ws, mask=cols, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        xs += BK
        ws += BK * stride
    return acc


@triton.jit
def _write_sums(sums, value, first_row, first_col, M, N):
    """Write a tile's sums of every 64 features, and of the squared distances from their mean."""
    BM: tl.constexpr = value.shape[0]
    CHUNKS: tl.constexpr = value.shape[1] // FEATURES
    chunks = tl.reshape(value, (BM, CHUNKS, FEATURES))
    total = tl.sum(chunks, axis=2)
    chunks -= (total * (1 / FEATURES))[:, :, None]
    row = first_row + tl.arange(0, BM)
    chunk = first_col // FEATURES + tl.arange(0, CHUNKS)
    first = sums + chunk[None, :] * 2 * M + row[:, None]
    inside = (row < M)[:, None] & (chunk < N // FEATURES)[None, :]
    tl.store(first, total, mask=inside)
    tl.store(first + M, tl.sum(chunks * chunks, axis=2), mask=inside)


@triton.jit
def gemm_kernel(
    x,  # (M, K)
    x2,  # (M, K2): the second source of the contraction, unread without TWO
    w,  # (N, K + K2), by strides
    bias,  # (N,)
    stats,  # (2, at least M) fp32, whose second row, rstd, is read with FOLD
    side,  # (M, N): the residual, or GELU's h
    out,  # (M, N)
    second,  # (M, N): GELU's h (gelu_save), GELU's value (gelu_backward)
    partial,  # (ceil(M / BM), N) fp32: column sums of out (gelu_backward)
    sums,  # (N / 64, 2, M) fp32, written with SUMS: see layernorm.sums
    M,
    N,
    K,
    K2,
    stride_wn,
    stride_wk,
    stride_stats,
    KIND: tl.constexpr,  # of contract.CASES
    FOLD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO: tl.constexpr,
    SUMS: tl.constexpr,
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

    k = tl.arange(0, BK)
    rows, cols = (row < M)[:, None], (col < N)[None, :]
    ws = w + col[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros([BM, BN], tl.float32)
    acc = _accumulate(acc, x + row.to(tl.int64)[:, None] * K + k[None, :], ws, rows, cols, K, stride_wk, BK)
    if TWO:
        xs = x2 + row.to(tl.int64)[:, None] * K2 + k[None, :]
        acc = _accumulate(acc, xs, ws + K * stride_wk, rows, cols, K2, stride_wk, BK)

    inside = rows & cols
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    if FOLD:
        acc *= tl.load(stats + stride_stats + row, mask=row < M, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    if KIND == "residual":
        acc += tl.load(side + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "gelu_save":
        # The backward sees the rounded h: round before the GELU.
        kept = acc.to(second.dtype.element_ty)
        tl.store(second + at, kept, mask=inside)
        acc = kept.to(tl.float32)
    if KIND == "gelu" or KIND == "gelu_save":
        phi, _ = _gate(acc)
        acc = 2.0 * acc * phi
    if KIND == "gelu_backward":
        h = tl.load(side + at, mask=inside, other=0.0).to(tl.float32)
        phi, w2 = _gate(h)
        tl.store(second + at, (2.0 * h * phi).to(second.dtype.element_ty), mask=inside)
        acc = acc * _gelu_slope(h, phi, w2)
        total = tl.sum(tl.where(inside, acc, 0.0), axis=0)
        tl.store(partial + tile_m * N + col, total, mask=col < N)
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    if SUMS:
        _write_sums(sums, rounded.to(tl.float32), tile_m * BM, tile_n * BN, M, N)


def arguments(call: Call, tuned: dict) -> tuple[tuple, dict, int, Product]:
    """Return the kernel's arguments, its launch options, the number of tiles, and the results."""
    epilogue, x, (w, bias), x2, stats, side, _, sums, transposed = call
    w = w.t() if transposed else w
    (M, K), N, (BM, BN, BK) = x.shape, w.shape[0], tuned["tile"]
    made = results(call, cdiv(M, BM))
    args = (
        x,
        x if x2 is None else x2,
        w,
        x if bias is None else bias,
        x if stats is None else stats,
        x if side is None else side,
        *made,
        made.partial if sums is None else sums,
        M,
        N,
        K,
        0 if x2 is None else x2.shape[1],
        w.stride(0),
        w.stride(1),
        0 if stats is None else stats.stride(0),
    )
    options = {
        "KIND": epilogue,
        "FOLD": stats is not None,
        "HAS_BIAS": bias is not None,
        "TWO": x2 is not None,
        "SUMS": sums is not None,
        "BM": BM,
        "BN": BN,
        "BK": BK,
        "GROUP": tuned["group"],
        "num_warps": tuned["warps"],
        "num_stages": tuned["stages"],
    }
    return args, options, cdiv(M, BM) * cdiv(N, BN), made


class Plain(Core):
    """The core in plain Triton. Weight and input gradients are cuBLAS's."""

    def product(self, call: Call) -> Product:
        device = call.x.device
        args, options, tiles, made = arguments(call, tuning.choice(device, CASES[call.epilogue], call.x.shape[1]))
        launch.run(device, gemm_kernel, (tiles,), args, options)
        return made


core = Plain()
