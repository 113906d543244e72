"""The backward of attention on sm_90, two kernels without atomics: dq with delta, then dk and dv.

dq: k and v stay in shared memory, blocks of q and dout stream past. dkv: q and dout stay, blocks of k and v stream
past. A streamed block moves to registers at once, so that its buffers can send the previous block's gradient out and
receive the next block while the products run. The rows of a tail go before the blocks, on 16-row products. Legend:
sm90_tiles.py.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from uvit_fast.kernels.attention.sm90_tiles import (
    LEFT,
    LEFT_SMALL,
    LOG2E,
    SMALL,
    Global,
    Head,
    Pair,
    accumulate,
    boxes,
    cut,
    down,
    index,
    left,
    masked,
    pieces,
    recut,
    row_bytes,
    rows_by_rows,
    scaled,
    shared_head,
    shared_rows,
    statistic,
    tail_accumulate,
    tail_rows_by_rows,
    tail_store,
    tail_zeros,
    zeros,
)
from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.hopper import barrier, barriers, mma, settled


@aggregate
class Statistics:
    """Statistics of queries: in registers, in shared memory, or as Heads for a whole head."""

    lse: gl.tensor | gl.shared_memory_descriptor | Head  # (rows,) fp32, base 2
    delta: gl.tensor | gl.shared_memory_descriptor | Head  # (rows,) fp32: sum over d of dout * out

    @gluon.jit
    def block(self, i):
        """Return one block of Heads."""
        return Statistics(self.lse.blocks.index(i), self.delta.blocks.index(i))

    @gluon.jit
    def tail(self):
        """Return the tail of Heads."""
        return Statistics(self.lse.tail, self.delta.tail)


@aggregate
class Workspace:
    """A kernel's shared memory: two of q, k, v and dout stay, the other two stream past."""

    stay: Pair  # of Heads
    stream: Pair  # of (64, D)
    all_in: gl.shared_memory_descriptor  # barrier of the rows that stay
    next_in: gl.shared_memory_descriptor  # barrier of the rows that stream

    @gluon.jit
    def load_stay(self, source):
        """Load all rows of `source`, a Pair of Global, asynchronously."""
        rows: gl.constexpr = self.stay.qk.blocks[0].shape[0] * 64 + (16 if self.stay.qk.tail is not None else 0)
        mbarrier.expect(self.all_in, 2 * rows * row_bytes(len(self.stream.qk) > 1))
        self.stay.qk.load(source.qk, self.all_in)
        self.stay.vo.load(source.vo, self.all_in)

    @gluon.jit
    def load_next(self, source, row, wanted=True):
        """Load the 64 rows from `row` on of `source`, a Pair of Global, asynchronously."""
        mbarrier.expect(self.next_in, 128 * row_bytes(len(self.stream.qk) > 1), pred=wanted)
        source.qk.load(row, self.stream.qk, self.next_in, wanted)
        source.vo.load(row, self.stream.vo, self.next_in, wanted)

    @gluon.jit
    def take_tail(self, source):
        """Return the tail's rows, streamed in, as a Pair in registers; start the first block, await what stays."""
        x = Pair(index(recut(self.stream.qk, 16), 0), index(recut(self.stream.vo, 16), 0)).to_registers(LEFT_SMALL)
        barrier()
        self.load_next(source, 0)
        mbarrier.wait(self.all_in, 0)
        return x


@gluon.jit
def _workspace(dtype: gl.constexpr, BLOCKS: gl.constexpr, TAIL: gl.constexpr, WIDE: gl.constexpr):
    stay = Pair(shared_head(dtype, BLOCKS, TAIL, WIDE), shared_head(dtype, BLOCKS, TAIL, WIDE))
    stream = Pair(shared_rows(dtype, [64], WIDE), shared_rows(dtype, [64], WIDE))
    bars = barriers(2)
    return Workspace(stay, stream, bars.index(0), bars.index(1))


@gluon.jit
def _across(x, below):
    """Return x (N,), in shared memory, as a row (1, N) above another tensor (rows, N)."""
    layout: gl.constexpr = gl.SliceLayout(0, below.type.layout)
    return gl.expand_dims(x.load(layout), 0)


@gluon.jit
def _dq_step(x, y, known, first, L, scale, dq, MASKED: gl.constexpr):
    """Return dq (64, D), () at first, plus the contribution of N keys, in flight.

    x = q, dout in registers and y = k, v in shared memory are Pairs; `known` is of the queries, in registers.
    """
    behind: gl.constexpr = len(y.qk)  # products that dp may still be behind by
    dtype: gl.constexpr = y.qk[0].dtype
    s = rows_by_rows(x.qk, y.qk)
    dp = rows_by_rows(x.vo, y.vo)
    done = settled((s,) + dq, behind)
    s, dq = done[0], done[1:]
    p = gl.exp2(s * scale - down(known.lse, s))
    if MASKED:
        # a padded key scores 0, and exp2(0 - lse) is infinite when every real score is very negative
        p = masked(p, first, L, 0.0)
    dp = settled((dp,))[0]
    return accumulate(left(p * (dp - down(known.delta, s)), dtype), y.qk, dq)


@gluon.jit
def _dkv_step(x, y, known, scale, grads):
    """Return the Pair of dk and dv (64, D), () at first, plus the contribution of N queries, in flight.

    x = k, v in registers and y = q, dout in shared memory are Pairs; `known` is of the queries, in shared memory.
    """
    behind: gl.constexpr = len(y.qk)  # products that dp may still be behind by
    dtype: gl.constexpr = y.qk[0].dtype
    s = rows_by_rows(x.qk, y.qk)
    dp = rows_by_rows(x.vo, y.vo)
    done = settled((s,) + grads.qk + grads.vo, behind)
    s, dk, dv = done[0], done[1 : 1 + len(grads.qk)], done[1 + len(grads.qk) :]
    lse = _across(known.lse, s)  # not before: it would take the registers that the products need
    p = gl.exp2(s * scale - lse)
    dv = accumulate(left(p, dtype), y.vo, dv)
    delta = _across(known.delta, s)
    dp = settled((dp,), behind)[0]
    return Pair(accumulate(left(p * (dp - delta), dtype), y.qk, dk), dv)


@gluon.jit
def _tail_dq_step(x, y, known, first, L, scale, dq):
    """Do `_dq_step` for the queries of the tail, dq (16, D)."""
    dtype: gl.constexpr = y.qk[0].dtype
    s = tail_rows_by_rows(x.qk, y.qk)
    dp = tail_rows_by_rows(x.vo, y.vo)
    p = masked(gl.exp2(s * scale - gl.expand_dims(known.lse, 1)), first, L, 0.0)
    return tail_accumulate(left(p * (dp - gl.expand_dims(known.delta, 1)), dtype, LEFT_SMALL), y.qk, dq)


@gluon.jit
def _tail_dkv_step(x, y, known, scale, grads):
    """Do `_dkv_step` for the keys of the tail, each gradient (16, D)."""
    dtype: gl.constexpr = y.qk[0].dtype
    s = tail_rows_by_rows(x.qk, y.qk)
    dp = tail_rows_by_rows(x.vo, y.vo)
    lse = _across(known.lse, s)
    delta = _across(known.delta, s)
    p = gl.exp2(s * scale - lse)
    dv = tail_accumulate(left(p, dtype, LEFT_SMALL), y.vo, grads.vo)
    return Pair(tail_accumulate(left(p * (dp - delta), dtype, LEFT_SMALL), y.qk, grads.qk), dv)


@gluon.jit
def _keep(pointer, L, other, BLOCKS: gl.constexpr, TAIL: gl.constexpr):
    """Return lse or delta of all queries in shared memory, as a Head."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks = gl.allocate_shared_memory(gl.float32, [BLOCKS, 64], flat)
    for n in gl.static_range(BLOCKS):
        blocks.index(n).store(statistic(pointer, n * 64, L, other, 64, layout))
    tail = None
    if TAIL:
        tail = gl.allocate_shared_memory(gl.float32, [16], flat)
        tail.store(statistic(pointer, BLOCKS * 64, L, other, 16, layout))
    return Head(blocks, tail)


@gluon.jit
def _out_rows(out, first, L, stride, ROWS: gl.constexpr, D: gl.constexpr):
    """Return rows of the forward's output as int32, pairs of values: single ones would take twice the registers."""
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [4, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, 32, layout=gl.SliceLayout(0, wide))
    at = gl.expand_dims(rows, 1) * stride + gl.expand_dims(columns, 0)
    main = gl.load(out + at, mask=gl.expand_dims(rows < L, 1), other=0)
    rest = None
    if D > 64:
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, narrow))
        columns = 32 + gl.arange(0, 8, layout=gl.SliceLayout(0, narrow))
        at = gl.expand_dims(rows, 1) * stride + gl.expand_dims(columns, 0)
        rest = gl.load(out + at, mask=gl.expand_dims(rows < L, 1) & gl.expand_dims(columns < D // 2, 0), other=0)
    return pieces(main, rest)


@gluon.jit
def _dot_pairs(x, y, SWIZZLE: gl.constexpr, layout: gl.constexpr):
    """Return row sums of x * y: x (ROWS, N) int32, pairs of `_out_rows`; y (64, 2N) in shared memory, swizzled so."""
    dtype: gl.constexpr = y.dtype
    shape: gl.constexpr = [64 // x.shape[0], x.shape[0], x.shape[1]]
    y = y._reinterpret(gl.int32, shape, gl.NVMMASharedLayout(SWIZZLE, 32, 2)).index(0).load(x.type.layout)
    low = x.to(gl.int16).to(dtype, bitcast=True).to(gl.float32) * y.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    x = (x >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    y = (y >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return gl.convert_layout(gl.sum(low + x * y, 1), layout)


@gluon.jit
def _delta(out, dout, layout: gl.constexpr):
    """Return delta (ROWS,), the sum over d of dout * out: out of `_out_rows`, dout (64, D) in shared memory."""
    delta = _dot_pairs(out[0], dout[0], 128, layout)
    if len(dout) > 1:
        delta += _dot_pairs(out[1], dout[1], 32, layout)
    return delta


@gluon.jit
def attention_dq_kernel(
    qkv,  # (B, L, 3H, D) in boxes of 64 rows and 64 columns
    qkv_rest,  # 64 rows, 16 columns; this and the others of 16 columns None where D = 64
    qkv_tail,  # 16 rows, 64 columns; these two None without a tail
    qkv_tail_rest,  # 16 rows, 16 columns
    dout,  # (B, L, H, D) in boxes of 64 rows, 64 columns
    dout_rest,  # 64 rows, 16 columns
    dqkv,  # (B, L, 3H, D) in boxes of 64 rows, 64 columns; its q part is written
    dqkv_rest,  # 64 rows, 16 columns
    out_pairs,  # (B, L, H, D / 2) int32: the forward's output, pairs of values
    dqkv_whole,  # (B, L, 3, H, D), what `dqkv` is a view of
    lse,  # (B, H, L) fp32, base 2
    delta,  # (B, H, L) fp32, written
    L,
    scale,  # D**-0.5 * log2(e)
    factor,  # D**-0.5
    D: gl.constexpr,
    H: gl.constexpr,
    BLOCKS: gl.constexpr,  # see `cut`
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
):
    """Write dq and delta."""
    START: gl.constexpr = BLOCKS * 64 if TAIL else 0  # the tail goes first
    BEFORE: gl.constexpr = 1 if TAIL else 0  # what has streamed past before block 0
    PAIRS: gl.constexpr = H * D // 2  # of a row of out
    row: gl.constexpr = gl.SliceLayout(1, mma(64))
    row_small: gl.constexpr = gl.SliceLayout(1, SMALL)
    space = _workspace(qkv.dtype, BLOCKS, TAIL, D > 64)

    head = gl.program_id(0)
    b = head // H
    h = head % H
    blocks, tails = pieces(qkv, qkv_rest), pieces(qkv_tail, qkv_tail_rest)
    queries = Pair(Global(blocks, tails, b, h), Global(pieces(dout, dout_rest), (), b, h))
    keys = Pair(Global(blocks, tails, b, H + h), Global(blocks, tails, b, 2 * H + h))
    to = Global(pieces(dqkv, dqkv_rest), (), b, h)
    outs = out_pairs + b.to(gl.int64) * L * PAIRS + h * (D // 2)
    lses = lse + head * L
    deltas = delta + head * L

    space.load_next(queries, START)
    space.load_stay(keys)
    if TAIL:
        out_tail = _out_rows(outs, START, L, PAIRS, 16, D)
        mbarrier.wait(space.next_in, 0)
        at = START + gl.arange(0, 16, layout=row_small)
        delta_tail = _delta(out_tail, space.stream.vo, row_small)
        gl.store(deltas + at, delta_tail, mask=at < L)
        known_tail = Statistics(statistic(lses, START, L, float("inf"), 16, row_small), delta_tail)
        x_tail = space.take_tail(queries)
        dq_tail = tail_zeros(D > 64)
        for j in range(BLOCKS):
            dq_tail = _tail_dq_step(x_tail, space.stay.block(j), known_tail, j * 64, L, scale, dq_tail)
        dq_tail = _tail_dq_step(x_tail, space.stay.tail(), known_tail, START, L, scale, dq_tail)
        pointer = dqkv_whole + b.to(gl.int64) * L * (3 * H * D) + h * D
        tail_store(pointer, scaled(dq_tail, factor), START, L, 3 * H * D, D)
    out = _out_rows(outs, 0, L, PAIRS, 64, D)
    dq = zeros(D > 64)
    mbarrier.wait(space.all_in, 0)
    for i in range(BLOCKS):
        mbarrier.wait(space.next_in, (i + BEFORE) & 1)
        rows = i * 64 + gl.arange(0, 64, layout=row)
        delta_block = _delta(out, space.stream.vo, row)
        gl.store(deltas + rows, delta_block, mask=rows < L)
        known = Statistics(statistic(lses, i * 64, L, float("inf"), 64, row), delta_block)
        x = space.stream.to_registers(LEFT)
        if i > 0:
            to.store((i - 1) * 64, dq, space.stream.qk)
        if TAIL:
            sums = _dq_step(x, space.stay.tail(), known, START, L, scale, (), True)
        else:
            sums = _dq_step(x, space.stay.block(0), known, 0, L, scale, (), RAGGED)
        # the block has moved to registers and the gradient of the one before it out: the buffers take the next one
        tma.store_wait(0)
        barrier()
        space.load_next(queries, (i + 1) * 64, i + 1 < BLOCKS)
        for j in range(1 - BEFORE, BLOCKS):
            sums = _dq_step(x, space.stay.block(j), known, j * 64, L, scale, sums, RAGGED)
        out = _out_rows(outs, (i + 1) * 64, L, PAIRS, 64, D)
        dq = scaled(settled(sums), factor)
    to.store((BLOCKS - 1) * 64, dq, space.stream.qk)
    tma.store_wait(0)


@gluon.jit
def attention_dkv_kernel(
    qkv,  # (B, L, 3H, D) in boxes of 64 rows and 64 columns
    qkv_rest,  # 64 rows, 16 columns; this and the others of 16 columns None where D = 64
    qkv_tail,  # 16 rows, 64 columns; this and the other tails None without one
    qkv_tail_rest,  # 16 rows, 16 columns
    dout,  # (B, L, H, D) in the same four boxes
    dout_rest,
    dout_tail,
    dout_tail_rest,
    dqkv,  # (B, L, 3H, D) in boxes of 64 rows, 64 columns; its k and v parts are written
    dqkv_rest,  # 64 rows, 16 columns
    dqkv_whole,  # (B, L, 3, H, D), what `dqkv` is a view of
    lse,  # (B, H, L) fp32, base 2
    delta,  # (B, H, L) fp32, as `attention_dq_kernel` wrote it
    L,
    scale,  # D**-0.5 * log2(e)
    factor,  # D**-0.5
    D: gl.constexpr,
    H: gl.constexpr,
    BLOCKS: gl.constexpr,  # see `cut`
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
):
    """Write dk and dv."""
    START: gl.constexpr = BLOCKS * 64 if TAIL else 0  # the tail goes first
    BEFORE: gl.constexpr = 1 if TAIL else 0  # what has streamed past before block 0
    space = _workspace(qkv.dtype, BLOCKS, TAIL, D > 64)

    head = gl.program_id(0)
    b = head // H
    h = head % H
    blocks, tails, written = pieces(qkv, qkv_rest), pieces(qkv_tail, qkv_tail_rest), pieces(dqkv, dqkv_rest)
    dout_head = Global(pieces(dout, dout_rest), pieces(dout_tail, dout_tail_rest), b, h)
    queries = Pair(Global(blocks, tails, b, h), dout_head)
    keys = Pair(Global(blocks, tails, b, H + h), Global(blocks, tails, b, 2 * H + h))
    to = Pair(Global(written, (), b, H + h), Global(written, (), b, 2 * H + h))

    space.load_next(keys, START)
    space.load_stay(queries)
    lses = _keep(lse + head * L, L, float("inf"), BLOCKS, TAIL)
    known = Statistics(lses, _keep(delta + head * L, L, 0.0, BLOCKS, TAIL))
    if TAIL:
        mbarrier.wait(space.next_in, 0)
        x_tail = space.take_tail(keys)
        tail = Pair(tail_zeros(D > 64), tail_zeros(D > 64))
        for j in range(BLOCKS):
            tail = _tail_dkv_step(x_tail, space.stay.block(j), known.block(j), scale, tail)
        tail = _tail_dkv_step(x_tail, space.stay.tail(), known.tail(), scale, tail)
        pointer = dqkv_whole + b.to(gl.int64) * L * (3 * H * D) + h * D
        tail_store(pointer + H * D, scaled(tail.qk, factor), START, L, 3 * H * D, D)
        tail_store(pointer + 2 * H * D, tail.vo, START, L, 3 * H * D, D)
    dk = zeros(D > 64)
    dv = zeros(D > 64)
    mbarrier.wait(space.all_in, 0)
    for i in range(BLOCKS):
        mbarrier.wait(space.next_in, (i + BEFORE) & 1)
        x = space.stream.to_registers(LEFT)
        if i > 0:
            to.qk.store((i - 1) * 64, dk, space.stream.qk)
            to.vo.store((i - 1) * 64, dv, space.stream.vo)
        if TAIL:
            sums = _dkv_step(x, space.stay.tail(), known.tail(), scale, Pair((), ()))
        else:
            sums = _dkv_step(x, space.stay.block(0), known.block(0), scale, Pair((), ()))
        tma.store_wait(0)
        barrier()
        space.load_next(keys, (i + 1) * 64, i + 1 < BLOCKS)
        for j in range(1 - BEFORE, BLOCKS):
            sums = _dkv_step(x, space.stay.block(j), known.block(j), scale, sums)
        dk = scaled(settled(sums.qk), factor)
        dv = settled(sums.vo)
    to.qk.store((BLOCKS - 1) * 64, dk, space.stream.qk)
    to.vo.store((BLOCKS - 1) * 64, dv, space.stream.vo)
    tma.store_wait(0)


def backward_launches(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, delta: Tensor, dqkv: Tensor) -> list[tuple]:
    """Return the kernels in execution order: (kernel, arguments, options)."""
    _, L, _, H, D = qkv.shape
    c = cut(L)
    tail = 16 if c["TAIL"] else None
    read, written = (*boxes(qkv, D, 64), *boxes(qkv, D, tail), *boxes(dout, D, 64)), boxes(dqkv, D, 64)
    common = (dqkv, lse, delta, L, D**-0.5 * LOG2E, D**-0.5, D)
    options = {"H": H, **c, "num_warps": 4}
    return [
        (attention_dq_kernel, (*read, *written, out.view(torch.int32), *common), options),
        (attention_dkv_kernel, (*read, *boxes(dout, D, tail), *written, *common), options),
    ]


def backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """Return the gradient of qkv, packed like qkv; all arguments are contiguous."""
    B, _, _, H, _ = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    for kernel, arguments, options in backward_launches(qkv, out, lse, dout, delta, dqkv):
        launch.run(qkv.device, kernel, (B * H,), arguments, options)
    return dqkv
