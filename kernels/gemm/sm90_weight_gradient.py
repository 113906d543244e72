"""Weight gradients on sm_90, in Gluon: dW = dy.T @ x contracted over the tokens, the bias gradient in the same pass.

Tiles of 128 x 256, two consumers and a TMA producer as in `gemm_hopper`. Whole waves of tiles run over all tokens and store their
result; the tiles that do not fill a wave are split over the tokens, so that they do, and a small kernel sums their fp32 parts in a
fixed order. All programs of a wave pass the same tokens at the same time: each is read from memory about once. Where the width of x
leaves a strip of 128 columns, the strip's tiles swap the roles of dy and x and so are as full as the others.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.launch import cdiv, descriptor
from uvit_fast.kernels.runtime.reduce import totals

ROWS, COLS, BK, STAGES = 64, 256, 64, 4  # rows of a tile a consumer, its columns, tokens a stage, stages


@gluon.jit
def _unit(unit, whole, ragged, splits, KT):
    """unit -> tile, first and last step. The first `whole` tiles are one unit each, the `ragged` others are `splits`."""
    v = unit - whole
    is_whole = unit < whole
    split = gl.where(is_whole, 0, v // ragged)
    tile = gl.where(is_whole, unit, whole + v % ragged)
    parts = gl.where(is_whole, 1, splits)
    return tile, split, split * KT // parts, (split + 1) * KT // parts


@gluon.jit
def _producer(dy_rows, dy_cols, x_rows, x_cols, a_bufs, b_bufs, full, empty, whole, ragged, splits, units, KT, tiles_n, plain, strip_at, S: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = dy_rows.block_type.shape[1]
    COLS: gl.constexpr = dy_cols.block_type.shape[1]
    BK: gl.constexpr = dy_rows.block_type.shape[0]
    step = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, split, first, last = _unit(unit, whole, ragged, splits, KT)
        straight = tile < plain
        a_at = gl.where(straight, (tile % tiles_n) * 2 * ROWS, strip_at)
        b_at = gl.where(straight, tile // tiles_n, tile - plain) * COLS
        for k in range(first, last):
            s = step % S
            mbarrier.wait(empty.index(s), ((step // S) & 1) ^ 1)
            bar = full.index(s)
            mbarrier.expect(bar, 2 * dy_rows.block_type.nbytes + dy_cols.block_type.nbytes)
            tma.async_copy_global_to_shared(x_cols, [k * BK, b_at], bar, b_bufs.index(s), pred=straight)
            tma.async_copy_global_to_shared(dy_cols, [k * BK, b_at], bar, b_bufs.index(s), pred=tile >= plain)
            for c in gl.static_range(2):
                at = a_at + c * ROWS
                tma.async_copy_global_to_shared(dy_rows, [k * BK, at], bar, a_bufs.index(2 * s + c), pred=straight)
                tma.async_copy_global_to_shared(x_rows, [k * BK, at], bar, a_bufs.index(2 * s + c), pred=tile >= plain)
            step += 1


@gluon.jit
def _main_loop(a_bufs, b_bufs, full, empty, step, count, WHO: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, BK: gl.constexpr, S: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    """The product [ROWS, COLS] over `count` stages; with BIAS also A summed over them, [BK, ROWS], beside the tensor cores."""
    acc = gl.zeros([ROWS, COLS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16]))
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    sums = gl.zeros([BK, ROWS], gl.float32, flat)
    s = step % S
    mbarrier.wait(full.index(s), (step // S) & 1)
    a = a_bufs.index(2 * s + WHO)
    acc = warpgroup_mma(a.permute([1, 0]), b_bufs.index(s), acc, use_acc=False, is_async=True)
    if BIAS:
        sums += a.load(flat).to(gl.float32)
    for i in range(step + 1, step + count):
        t = i % S
        mbarrier.wait(full.index(t), (i // S) & 1)
        a = a_bufs.index(2 * t + WHO)
        acc = warpgroup_mma(a.permute([1, 0]), b_bufs.index(t), acc, is_async=True)
        if BIAS:
            sums += a.load(flat).to(gl.float32)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        mbarrier.arrive(empty.index((i - 1) % S), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + count - 1) % S), count=1)
    return acc, sums


@gluon.jit
def _consumer(out, parts, bias_parts, a_bufs, b_bufs, full, empty, N, K, stride, whole, ragged, splits, units, KT, tiles_n, plain, WHO: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, BK: gl.constexpr, S: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    step = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, split, first, last = _unit(unit, whole, ragged, splits, KT)
        at = (
            tile % tiles_n
        ) * 2 * ROWS + WHO * ROWS  # the consumer's first feature of dy, where the roles are not swapped
        if BIAS:
            if tile < tiles_n:  # one tile a row of tiles sums it
                acc, sums = _main_loop(a_bufs, b_bufs, full, empty, step, last - first, WHO, ROWS, COLS, BK, S, True)
                row = at + gl.arange(0, ROWS, layout=gl.SliceLayout(0, flat))
                gl.store(bias_parts + split * N + row, gl.sum(sums, axis=0), mask=row < N)
            else:
                acc, sums = _main_loop(a_bufs, b_bufs, full, empty, step, last - first, WHO, ROWS, COLS, BK, S, False)
        else:
            acc, sums = _main_loop(a_bufs, b_bufs, full, empty, step, last - first, WHO, ROWS, COLS, BK, S, False)
        i = gl.arange(0, ROWS, layout=gl.SliceLayout(1, lay))
        j = gl.arange(0, COLS, layout=gl.SliceLayout(0, lay))
        if unit < whole:
            row = at + i
            col = (tile // tiles_n) * COLS + j
            inside = gl.expand_dims(row < N, 1) & gl.expand_dims(col < K, 0)
            where = gl.expand_dims(row * stride, 1) + gl.expand_dims(col, 0)
            gl.store(out + where, acc.to(out.dtype.element_ty), mask=inside)
        else:
            slot = ((unit - whole) * 2 + WHO) * ROWS + i
            gl.store(parts + gl.expand_dims(slot * COLS, 1) + gl.expand_dims(j, 0), acc)
        step += last - first


@gluon.jit
def wgrad_kernel(
    dy_rows,  # (M, N), tiles [BK, ROWS]
    dy_cols,  # (M, N), tiles [BK, COLS]
    x_rows,  # (M, K), tiles [BK, ROWS]
    x_cols,  # (M, K), tiles [BK, COLS]
    out,  # (N, K), rows `stride` apart
    parts,  # (ragged * splits, 2 * ROWS, COLS) fp32
    bias_parts,  # (splits, N) fp32, zeroed
    N,
    K,
    stride,
    whole,  # tiles that run over all tokens
    ragged,  # tiles that are split
    splits,
    units,
    KT,  # steps over the tokens
    tiles_n,  # rows of tiles
    plain,  # tiles with rows from dy; the others swap the roles
    strip_at,  # the first column of theirs
    S: gl.constexpr,
    BIAS: gl.constexpr,
):
    ROWS: gl.constexpr = dy_rows.block_type.shape[1]
    COLS: gl.constexpr = dy_cols.block_type.shape[1]
    BK: gl.constexpr = dy_rows.block_type.shape[0]
    a_bufs = gl.allocate_shared_memory(dy_rows.dtype, [2 * S] + dy_rows.block_type.shape, dy_rows.layout)
    b_bufs = gl.allocate_shared_memory(dy_cols.dtype, [S] + dy_cols.block_type.shape, dy_cols.layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consumer, (out, parts, bias_parts, a_bufs, b_bufs, full, empty, N, K, stride, whole, ragged, splits, units, KT, tiles_n, plain, 0, ROWS, COLS, BK, S, BIAS)),
            (_consumer, (out, parts, bias_parts, a_bufs, b_bufs, full, empty, N, K, stride, whole, ragged, splits, units, KT, tiles_n, plain, 1, ROWS, COLS, BK, S, BIAS)),
            (_producer, (dy_rows, dy_cols, x_rows, x_cols, a_bufs, b_bufs, full, empty, whole, ragged, splits, units, KT, tiles_n, plain, strip_at, S)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@triton.jit
def sum_kernel(
    parts,  # (splits, ragged, 128, 256) fp32
    out,  # (N, K), rows `stride` apart
    N,
    K,
    stride,
    whole,
    ragged,
    splits,
    tiles_n,
    plain,
    strip_at,
    HEIGHT: tl.constexpr,
):
    """The split tiles: sum over the splits in their order, cast, store; the swapped ones transposed."""
    tile = whole + tl.program_id(0)
    i = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    j = tl.arange(0, 256)
    at = parts + tl.program_id(0) * 128 * 256 + i[:, None] * 256 + j[None, :]
    total = tl.zeros([HEIGHT, 256], tl.float32)
    for _ in range(splits):
        total += tl.load(at)
        at += ragged * 128 * 256
    value = total.to(out.dtype.element_ty)
    if tile < plain:
        n = (tile % tiles_n) * 128 + i
        k = (tile // tiles_n) * 256 + j
        tl.store(out + n[:, None] * stride + k[None, :], value, mask=(n < N)[:, None] & (k < K)[None, :])
    else:
        n2 = (tile - plain) * 256 + j
        k2 = strip_at + i
        tl.store(out + n2[None, :] * stride + k2[:, None], value, mask=(n2 < N)[None, :] & (k2 < K)[:, None])


def plan(M: int, N: int, K: int, programs: int) -> dict[str, int]:
    """How the tiles of an (N, K) gradient over M tokens are laid out and split over this many programs."""
    tiles_n, strip = cdiv(N, 2 * ROWS), K > COLS and 0 < K % COLS <= 2 * ROWS
    plain = tiles_n * (K // COLS if strip else cdiv(K, COLS))
    tiles, steps = plain + (cdiv(N, COLS) if strip else 0), cdiv(M, BK)
    whole = min(tiles, plain) // programs * programs  # the swapped tiles are stored by the sum
    ragged = tiles - whole
    # Few splits, and little idle time in the last wave: each split costs about two hundredths of a wave to write and sum.
    waves = {n: cdiv(ragged * n, programs) / n + 0.02 * n for n in range(1, min(8, steps) + 1)}
    splits = min(waves, key=waves.get)
    return {
        "whole": whole,
        "ragged": ragged,
        "splits": splits,
        "units": whole + ragged * splits,
        "KT": steps,
        "tiles_n": tiles_n,
        "plain": plain,
        "strip_at": K // COLS * COLS,
    }


def arguments(dy: Tensor, x: Tensor, out: Tensor, bias: bool, programs: int) -> tuple[tuple, dict, dict]:
    """The kernel's arguments, its launch options and the plan."""
    (M, N), K = dy.shape, x.shape[1]
    p = plan(M, N, K, programs)
    parts = dy.new_empty(p["ragged"] * p["splits"], 2 * ROWS, COLS, dtype=ACCUMULATE)
    bias_parts = dy.new_zeros(p["splits"], N, dtype=ACCUMULATE) if bias else parts
    tiles = [descriptor(t, BK, width) for t in (dy, x) for width in (ROWS, COLS)]
    args = (*tiles, out, parts, bias_parts, N, K, out.stride(0), *p.values(), STAGES, bias)
    return args, {"num_warps": 4, "maxnreg": 168}, p


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor, bias: bool) -> Tensor | None:
    """out = dy.T @ x, and with `bias` the column sums of dy.

    Args:
        dy: (M, N); x: (M, K), contiguous, bf16 or fp16.
        out: (N, K), rows contiguous, any distance apart.

    Returns:
        (N,) with `bias`, else None.
    """
    programs = multiprocessors(dy.device)
    args, options, p = arguments(dy, x, out, bias, programs)
    parts, bias_parts = args[5:7]
    launch.run(dy.device, wgrad_kernel, (min(programs, p["units"]),), args, options)
    if p["ragged"]:
        layout = [p[name] for name in ("whole", "ragged", "splits", "tiles_n", "plain", "strip_at")]
        args = (parts, out, dy.shape[1], x.shape[1], out.stride(0), *layout)
        launch.run(dy.device, sum_kernel, (p["ragged"], 8), args, {"HEIGHT": 16})
    return totals(bias_parts, 1, dy.dtype)[0] if bias else None
