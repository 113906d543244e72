"""Weight gradients on sm_90, in Gluon: dW = dy.T @ x contracted over the tokens, the bias gradient in the same pass.

Tiles of 128 x 256, two consumers and a TMA producer as in `sm90`. Whole waves of tiles run over all tokens and store
their result; the tiles that do not fill a wave are split over the tokens so that they do, and a small kernel sums their
fp32 parts in a fixed order. All programs of a wave pass the same tokens at the same time: each is read from memory
about once. Where the width of x leaves a strip of 128 columns, the strip's tiles swap the roles of dy and x, and so are
as full as the others.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from uvit_fast.kernels.gemm.sm90_ring import Ring, ring
from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.hopper import mma
from uvit_fast.kernels.runtime.launch import cdiv, descriptor
from uvit_fast.kernels.runtime.reduce import totals

ROWS, COLS, BK, STAGES = 64, 256, 64, 4  # a consumer's rows of a tile, its columns, tokens per stage, stages


@aggregate
class Plan:
    """The layout and split of the tiles: see `plan`."""

    whole: gl.tensor  # tiles that run over all tokens
    ragged: gl.tensor  # tiles that are split
    splits: gl.tensor
    units: gl.tensor  # the programs' work items: whole tiles, then parts of the others
    steps: gl.tensor  # over all tokens
    down: gl.tensor  # rows of tiles
    plain: gl.tensor  # tiles with rows from dy; the others swap the roles
    strip: gl.tensor  # first column of the strip

    @gluon.jit
    def unit(self, unit):
        """Return a unit's tile, its part of it, its first step and its end."""
        v = unit - self.whole
        is_whole = unit < self.whole
        split = gl.where(is_whole, 0, v // self.ragged)
        tile = gl.where(is_whole, unit, self.whole + v % self.ragged)
        parts = gl.where(is_whole, 1, self.splits)
        return tile, split, split * self.steps // parts, (split + 1) * self.steps // parts


@aggregate
class Gradient:
    """A launch: dW = dy.T @ x, and where its tiles go."""

    dy_rows: tma.tensor_descriptor  # (M, N) in boxes of [BK, ROWS]
    dy_cols: tma.tensor_descriptor  # (M, N), [BK, COLS]
    x_rows: tma.tensor_descriptor  # (M, K), [BK, ROWS]
    x_cols: tma.tensor_descriptor  # (M, K), [BK, COLS]
    out: gl.tensor  # (N, K), rows `stride` apart
    parts: gl.tensor  # (ragged * splits, 2 ROWS, COLS) fp32
    bias_parts: gl.tensor  # (splits, N) fp32
    N: gl.tensor
    K: gl.tensor
    stride: gl.tensor
    ring: Ring
    plan: Plan
    BIAS: gl.constexpr


@gluon.jit
def _producer(g):
    ROWS: gl.constexpr = g.dy_rows.block_type.shape[1]
    COLS: gl.constexpr = g.dy_cols.block_type.shape[1]
    BK: gl.constexpr = g.dy_rows.block_type.shape[0]
    BYTES: gl.constexpr = 2 * g.dy_rows.block_type.nbytes + g.dy_cols.block_type.nbytes
    step = 0
    for unit in range(gl.program_id(0), g.plan.units, gl.num_programs(0)):
        tile, split, first, last = g.plan.unit(unit)
        straight = tile < g.plan.plain
        a_at = gl.where(straight, (tile % g.plan.down) * 2 * ROWS, g.plan.strip)
        b_at = gl.where(straight, tile // g.plan.down, tile - g.plan.plain) * COLS
        for k in range(first, last):
            s, bar = g.ring.claim(step, BYTES)
            b = g.ring.b.index(s)
            tma.async_copy_global_to_shared(g.x_cols, [k * BK, b_at], bar, b, pred=straight)
            tma.async_copy_global_to_shared(g.dy_cols, [k * BK, b_at], bar, b, pred=tile >= g.plan.plain)
            for c in gl.static_range(2):
                a, at = g.ring.a.index(2 * s + c), [k * BK, a_at + c * ROWS]
                tma.async_copy_global_to_shared(g.dy_rows, at, bar, a, pred=straight)
                tma.async_copy_global_to_shared(g.x_rows, at, bar, a, pred=tile >= g.plan.plain)
            step += 1


@gluon.jit
def _product(ring, step, count, WHO: gl.constexpr, COLS: gl.constexpr, BIAS: gl.constexpr):
    """Return the product [64, COLS] over `count` stages; with BIAS, on other cores, A summed over them, [BK, 64]."""
    acc = gl.zeros([64, COLS], gl.float32, mma(COLS))
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BK: gl.constexpr = ring.a.shape[1]
    sums = gl.zeros([BK, 64], gl.float32, flat)
    a, b = ring.operands(step, WHO)
    acc = warpgroup_mma(a, b, acc, use_acc=False, is_async=True)
    if BIAS:
        sums += a.permute([1, 0]).load(flat).to(gl.float32)
    for i in range(step + 1, step + count):
        a, b = ring.operands(i, WHO)
        acc = warpgroup_mma(a, b, acc, is_async=True)
        if BIAS:
            sums += a.permute([1, 0]).load(flat).to(gl.float32)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        ring.free(i - 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    ring.free(step + count - 1)
    return acc, sums


@gluon.jit
def _consumer(g, WHO: gl.constexpr):
    COLS: gl.constexpr = g.dy_cols.block_type.shape[1]
    lay: gl.constexpr = mma(COLS)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    step = 0
    for unit in range(gl.program_id(0), g.plan.units, gl.num_programs(0)):
        tile, split, first, last = g.plan.unit(unit)
        # The consumer's first feature of dy, where the roles are not swapped.
        at = (tile % g.plan.down) * 2 * 64 + WHO * 64
        if g.BIAS and tile < g.plan.down:  # one tile per row of tiles sums it
            acc, sums = _product(g.ring, step, last - first, WHO, COLS, True)
            row = at + gl.arange(0, 64, layout=gl.SliceLayout(0, flat))
            gl.store(g.bias_parts + split * g.N + row, gl.sum(sums, axis=0), mask=row < g.N)
        else:
            acc, sums = _product(g.ring, step, last - first, WHO, COLS, False)
        i = gl.arange(0, 64, layout=gl.SliceLayout(1, lay))
        j = gl.arange(0, COLS, layout=gl.SliceLayout(0, lay))
        if unit < g.plan.whole:
            row = at + i
            col = (tile // g.plan.down) * COLS + j
            inside = gl.expand_dims(row < g.N, 1) & gl.expand_dims(col < g.K, 0)
            where = gl.expand_dims(row * g.stride, 1) + gl.expand_dims(col, 0)
            gl.store(g.out + where, acc.to(g.out.dtype.element_ty), mask=inside)
        else:
            slot = ((unit - g.plan.whole) * 2 + WHO) * 64 + i
            gl.store(g.parts + gl.expand_dims(slot * COLS, 1) + gl.expand_dims(j, 0), acc)
        step += last - first


@gluon.jit
def weight_gradient_kernel(
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
    whole,  # these eight: see Plan
    ragged,
    splits,
    units,
    steps,
    down,
    plain,
    strip,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
):
    plan = Plan(whole, ragged, splits, units, steps, down, plain, strip)
    stages = ring(dy_rows, dy_cols, STAGES, True, False)
    g = Gradient(dy_rows, dy_cols, x_rows, x_cols, out, parts, bias_parts, N, K, stride, stages, plan, BIAS)
    gl.warp_specialize([(_consumer, (g, 0)), (_consumer, (g, 1)), (_producer, (g,))], [4, 1], [232, 40])


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
    down,
    plain,
    strip,
    HEIGHT: tl.constexpr,
):
    """Sum each split tile over its splits, in order, cast and store it; the swapped ones transposed."""
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
        n = (tile % down) * 128 + i
        k = (tile // down) * 256 + j
        tl.store(out + n[:, None] * stride + k[None, :], value, mask=(n < N)[:, None] & (k < K)[None, :])
    else:
        n2 = (tile - plain) * 256 + j
        k2 = strip + i
        tl.store(out + n2[None, :] * stride + k2[:, None], value, mask=(n2 < N)[None, :] & (k2 < K)[:, None])


def plan(M: int, N: int, K: int, programs: int) -> dict[str, int]:
    """Return the layout and split of the tiles of an (N, K) gradient over M tokens, for this many programs."""
    down, strip = cdiv(N, 2 * ROWS), K > COLS and 0 < K % COLS <= 2 * ROWS
    plain = down * (K // COLS if strip else cdiv(K, COLS))
    tiles, steps = plain + (cdiv(N, COLS) if strip else 0), cdiv(M, BK)
    whole = min(tiles, plain) // programs * programs  # the swapped tiles are stored by the sum
    ragged = tiles - whole
    # Few splits, and little idle time in the last wave: a split costs about a fiftieth of a wave to write and sum.
    waves = {n: cdiv(ragged * n, programs) / n + 0.02 * n for n in range(1, min(8, steps) + 1)}
    splits = min(waves, key=waves.get)
    return {
        "whole": whole,
        "ragged": ragged,
        "splits": splits,
        "units": whole + ragged * splits,
        "steps": steps,
        "down": down,
        "plain": plain,
        "strip": K // COLS * COLS,
    }


def arguments(dy: Tensor, x: Tensor, out: Tensor, bias: bool, programs: int) -> tuple[tuple, dict, dict]:
    """Return the kernel's arguments, its launch options and the plan."""
    (M, N), K = dy.shape, x.shape[1]
    p = plan(M, N, K, programs)
    parts = dy.new_empty(p["ragged"] * p["splits"], 2 * ROWS, COLS, dtype=ACCUMULATE)
    # A whole tile's sums are its first split's; without such tiles every split writes its own.
    new = dy.new_zeros if p["whole"] else dy.new_empty
    bias_parts = new(p["splits"], N, dtype=ACCUMULATE) if bias else parts
    tiles = [descriptor(t, BK, width) for t in (dy, x) for width in (ROWS, COLS)]
    args = (*tiles, out, parts, bias_parts, N, K, out.stride(0), *p.values(), STAGES, bias)
    return args, {"num_warps": 4, "maxnreg": 168}, p


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor, bias: bool) -> Tensor | None:
    """Write out = dy.T @ x, and return with `bias` the column sums of dy.

    Args:
        dy: (M, N); x: (M, K), contiguous, bf16 or fp16.
        out: (N, K), rows contiguous, any distance apart.

    Returns:
        (N,) with `bias`, else None.
    """
    programs = multiprocessors(dy.device)
    args, options, p = arguments(dy, x, out, bias, programs)
    parts, bias_parts = args[5:7]
    launch.run(dy.device, weight_gradient_kernel, (min(programs, p["units"]),), args, options)
    if p["ragged"]:
        layout = [p[name] for name in ("whole", "ragged", "splits", "down", "plain", "strip")]
        args = (parts, out, dy.shape[1], x.shape[1], out.stride(0), *layout)
        launch.run(dy.device, sum_kernel, (p["ragged"], 8), args, {"HEIGHT": 16})
    return totals(bias_parts, 1, dy.dtype)[0] if bias else None
