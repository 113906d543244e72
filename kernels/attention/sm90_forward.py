"""Attention of short sequences for sm_90 in Gluon: one CTA per head, the whole head in shared memory, two CTAs per SM.

TMA reads q, k and v straight from packed qkv. k and v stay, blocks of queries stream past; the rows of a tail go first,
on 16-row products, and as keys they are one more, narrow product of every block. Scores are held in base 2:
p = exp2(s * scale * log2(e) - lse). Legend and parts: sm90_tiles.py. The backward: sm90_backward.py.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from uvit_fast.kernels.attention.sm90_backward import backward as backward
from uvit_fast.kernels.attention.sm90_backward import backward_launches as backward_launches
from uvit_fast.kernels.attention.sm90_tiles import (
    LEFT_SMALL,
    LOG2E,
    SMALL,
    Global,
    Pair,
    accumulate,
    boxes,
    cut,
    down,
    index,
    left,
    masked,
    narrow_store,
    narrow_tail_store,
    pieces,
    recut,
    reshaped,
    row_bytes,
    rows_by_rows,
    scaled_rows,
    shared_head,
    shared_rows,
    tail_accumulate,
    tail_rows_by_rows,
    tail_store,
    tail_zeros,
    to_registers,
    zeros,
)
from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.hopper import barrier, barriers, let_next_begin, mma, settled, wait_for_others
from uvit_fast.kernels.runtime.launch import cdiv

ALONE = 114 * 1024  # bytes of shared memory, of which no two programs get as much on one multiprocessor


@aggregate
class Attended:
    """What some queries have seen of their keys so far."""

    m: gl.tensor  # (rows,) fp32: the largest score, in base 2
    total: gl.tensor  # (rows,) fp32: the sum of p = exp2(s - m)
    o: gl.tuple  # (rows, D) fp32: the sum of p v

    @gluon.jit
    def lse(self):
        return self.m + gl.log2(self.total)

    @gluon.jit
    def out(self):
        return scaled_rows(self.o, 1.0 / self.total)


@gluon.jit
def _tail_attend(x, y, via, first, L, scale, seen, MASKED: gl.constexpr):
    """Return `seen` by the tail's queries, x (16, D) in registers, after N more keys; `via` (64, 64) passes p on."""
    N: gl.constexpr = y.qk[0].shape[0]
    s = tail_rows_by_rows(x, y.qk) * scale
    if MASKED:
        s = masked(s, first, L, float("-inf"))
    new = gl.maximum(seen.m, gl.max(s, 1))
    p = gl.exp2(s - gl.expand_dims(new, 1))
    shrink = gl.exp2(seen.m - new)
    via = reshaped(via, 16, N).index(0)
    via.store(p.to(via.dtype))
    barrier()
    o = tail_accumulate(via.load(LEFT_SMALL), y.vo, seen.o, shrink)
    barrier()  # all of p is read: `via` may be written
    return Attended(new, seen.total * shrink + gl.sum(p, 1), o)


@gluon.jit
def _attend_whole_tail(x, keys, via, L, scale):
    """Return all that the queries of the tail see: x (16, D) in registers, keys a Pair of Heads."""
    row: gl.constexpr = gl.SliceLayout(1, SMALL)
    blocks: gl.constexpr = keys.qk.blocks[0].shape[0]
    end: gl.constexpr = blocks * keys.qk.blocks[0].shape[1]
    m = gl.full([16], float("-inf"), gl.float32, row)
    seen = Attended(m, gl.zeros([16], gl.float32, row), tail_zeros(len(x) > 1))
    for n in gl.static_range(blocks):
        seen = _tail_attend(x, keys.block(n), via, 0, L, scale, seen, False)
    return _tail_attend(x, keys.tail(), via, end, L, scale, seen, True)


@gluon.jit
def attention_forward_kernel(
    qkv,  # (B, L, 3H, D) in boxes of 64 rows and 64 columns
    qkv_rest,  # 64 rows, 16 columns; this and the others of 16 columns None where D = 64
    kv_main,  # BN rows, 64 columns: k and v come in larger boxes
    kv_rest,  # BN rows, 16 columns
    qkv_tail,  # 16 rows, 64 columns; these two None without a tail
    qkv_tail_rest,  # 16 rows, 16 columns
    out,  # (B, L, H, D) in boxes of 64 rows, 64 columns; this and the next None for an e4m3 result
    out_rest,  # 64 rows, 16 columns
    out_whole,  # (B, L, H, D), what `out` is a view of; or (B, L, H * D) e4m3, in the order of `narrow`
    lse,  # (B, H, L) fp32, base 2
    L,
    scale,  # D**-0.5 * log2(e)
    D: gl.constexpr,
    H: gl.constexpr,
    BLOCKS: gl.constexpr,  # see `cut`
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
    BN: gl.constexpr,  # keys per product: 64 times a power of two that divides BLOCKS
    CHUNKS: gl.constexpr,  # programs that share a head's queries
    EARLY: gl.constexpr,  # whether the kernel may begin before the one before it has ended
    BUFFERS: gl.constexpr,  # for queries: two, and what keeps a second program from the multiprocessor
):
    WIDE: gl.constexpr = D > 64
    ROW: gl.constexpr = row_bytes(WIDE)
    NARROW: gl.constexpr = out is None
    HEAD: gl.constexpr = (BLOCKS * 64 + (16 if TAIL else 0)) * ROW
    NK: gl.constexpr = BLOCKS * 64 // BN
    START: gl.constexpr = BLOCKS * 64 if TAIL else 0  # the tail goes first
    ITEMS: gl.constexpr = BLOCKS + (1 if TAIL else 0)
    row: gl.constexpr = gl.SliceLayout(1, mma(BN))

    kv = Pair(shared_head(qkv.dtype, BLOCKS, TAIL, WIDE), shared_head(qkv.dtype, BLOCKS, TAIL, WIDE))
    stream = shared_rows(qkv.dtype, [BUFFERS, 64], WIDE)  # queries, and where they were, their output
    bars = barriers(4)  # two of q, k, v

    # This program's blocks of queries, and whether it has the tail, which goes through the buffers before them.
    head = gl.program_id(0) // CHUNKS
    first = 0
    before = 1 if TAIL else 0
    count = BLOCKS
    if CHUNKS > 1:
        chunk = gl.program_id(0) % CHUNKS
        first = chunk * ITEMS // CHUNKS
        before = gl.to_tensor(0)
        if TAIL:
            before = (chunk == CHUNKS - 1).to(gl.int32)
        count = (chunk + 1) * ITEMS // CHUNKS - first - before
    b = head // H
    h = head % H
    blocks, tails = pieces(qkv, qkv_rest), pieces(qkv_tail, qkv_tail_rest)
    many, keys = pieces(kv_main, kv_rest), Pair(kv.qk.recut(BN), kv.vo.recut(BN))
    q = Global(blocks, tails, b, h)
    to = Global(pieces(out, out_rest), (), b, h)
    whole = out_whole + b.to(gl.int64) * L * (H * D)
    if EARLY:
        wait_for_others()
    let_next_begin()
    mbarrier.expect(bars.index(0), 64 * ROW)
    if CHUNKS > 1:
        q.load(gl.where(before > 0, START, first * 64), index(stream, 0), bars.index(0))
    else:
        q.load(START, index(stream, 0), bars.index(0))
    mbarrier.expect(bars.index(2), HEAD)
    keys.qk.load(Global(many, tails, b, H + h), bars.index(2))
    mbarrier.expect(bars.index(3), HEAD)
    keys.vo.load(Global(many, tails, b, 2 * H + h), bars.index(3))
    if count + before > 1:
        mbarrier.expect(bars.index(1), 64 * ROW)
        q.load(64 * (first + 1 - before), index(stream, 1), bars.index(1))

    if TAIL:
        if before > 0:
            mbarrier.wait(bars.index(0), 0)
            x_tail = to_registers(index(recut(index(stream, 0), 16), 0), LEFT_SMALL)
            barrier()
            mbarrier.wait(bars.index(2), 0)
            mbarrier.wait(bars.index(3), 0)
            tail = _attend_whole_tail(x_tail, keys, stream[0].index(0), L, scale)
            rows_tail = START + gl.arange(0, 16, layout=gl.SliceLayout(1, SMALL))
            gl.store(lse + head * L + rows_tail, tail.lse(), mask=rows_tail < L)
            if NARROW:
                narrow_tail_store(whole, tail.out(), START, L, h, H, D)
            else:
                tail_store(whole + h * D, tail.out(), START, L, H * D, D)
            fence_async_shared()  # TMA is next to write where the scores were
    for i in range(count):
        u = (i + before) & 1
        mbarrier.wait(bars.index(u), ((i + before) // 2) & 1)
        mbarrier.wait(bars.index(2), 0)
        m = gl.full([64], float("-inf"), gl.float32, row)
        total = gl.zeros([64], gl.float32, row)
        o = zeros(WIDE)
        for j in gl.static_range(NK):
            s = rows_by_rows(index(stream, u), keys.block(j).qk)
            if TAIL and j == NK - 1:
                t = rows_by_rows(index(stream, u), keys.tail().qk)
                s, t = warpgroup_mma_wait(0, deps=(s, t))
                t = masked(t, START, L, float("-inf"))
            else:
                s = warpgroup_mma_wait(0, deps=(s,))
            if j == 0 and i + before > 0:
                # the other buffer has held the output of the block before this one: by now that has left
                tma.store_wait(0)
                if NARROW:
                    barrier()  # or, where none is stored through it, every warp has read its queries
                if i + 1 < count:
                    mbarrier.expect(bars.index(1 - u), 64 * ROW)
                    q.load((first + i + 1) * 64, index(stream, 1 - u), bars.index(1 - u))
            if RAGGED:
                s = masked(s, j * BN, L, float("-inf"))
            top = gl.max(s, 1)
            if TAIL and j == NK - 1:
                top = gl.maximum(top, gl.convert_layout(gl.max(t, 1), row))
            if NK == 1:
                m = top * scale
                p = gl.exp2(s * scale - gl.expand_dims(m, 1))
                total = gl.sum(p, 1)
            else:
                new = gl.maximum(m, top * scale)
                p = gl.exp2(s * scale - gl.expand_dims(new, 1))
                shrink = gl.exp2(m - new)
                total = total * shrink + gl.sum(p, 1)
                m = new
                o = scaled_rows(o, shrink)
            p = left(p, qkv.dtype)
            if j == 0:
                mbarrier.wait(bars.index(3), 0)
            o = accumulate(p, keys.block(j).vo, o)
            if TAIL and j == NK - 1:
                t = gl.exp2(t * scale - down(m, t))
                total += gl.convert_layout(gl.sum(t, 1), row)
                o = accumulate(left(t, qkv.dtype), keys.tail().vo, o)
            o = settled(o)
        seen = Attended(m, total, o)
        rows = (first + i) * 64 + gl.arange(0, 64, layout=row)
        gl.store(lse + head * L + rows, seen.lse(), mask=rows < L)
        if NARROW:
            narrow_store(whole, seen.out(), (first + i) * 64, L, h, H, D)
        else:
            to.store((first + i) * 64, seen.out(), index(stream, u))
    tma.store_wait(0)


def forward_launch(qkv: Tensor, out: Tensor, lse: Tensor, chunks: int = 1, early: bool = False) -> tuple:
    """Return the kernel, its arguments and its options.

    Args:
        chunks: programs per head.
        early: whether the kernel may begin before the one before it has ended (`runtime.hopper`). Its programs come to
            the multiprocessors that are free by then: no two to one of them.
    """
    _, L, _, H, D = qkv.shape
    c = cut(L)
    keys = 256 if c["BLOCKS"] % 4 == 0 else 128 if c["BLOCKS"] % 2 == 0 else 64
    wide = out.dtype == qkv.dtype
    read = (*boxes(qkv, D, 64), *boxes(qkv, D, keys), *boxes(qkv, D, 16 if c["TAIL"] else None))
    boxed = (*read, *boxes(out, D, 64 if wide else None))
    arguments = (*boxed, out, lse, L, D**-0.5 * LOG2E, D)
    buffers = 2
    if early:
        row = row_bytes(D > 64)
        held = 2 * (64 * c["BLOCKS"] + 16 * c["TAIL"]) * row  # bytes of keys and values
        buffers = max(cdiv(ALONE - held, 64 * row), 2)
    options = {"H": H, **c, "BN": keys, "CHUNKS": chunks, "EARLY": early, "BUFFERS": buffers, "num_warps": 4}
    return attention_forward_kernel, arguments, options | {"launch_pdl": True} if early else options


def forward(qkv: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return out (B, L, H*D) and lse (B, H, L), fp32 in base 2, of qkv (B, L, 3, H, D), contiguous.

    out is of qkv's dtype, or of e4m3 with its features in the order of `sm90_tiles.narrow`, for D of 64 to 80.
    """
    B, L, _, H, D = qkv.shape
    out = qkv.new_empty(B, L, H * D, dtype=dtype)
    lse = qkv.new_empty(B, H, L, dtype=torch.float32)
    n = chunks(B * H, L, multiprocessors(qkv.device))
    kernel, arguments, options = forward_launch(qkv, out, lse, n, early=n > 1)
    launch.run(qkv.device, kernel, (B * H * n,), arguments, options)
    return out, lse


@functools.cache
def chunks(heads: int, L: int, at_once: int) -> int:
    """Return how many programs share a head's queries: where there are few heads, one for each multiprocessor."""
    c = cut(L)
    return min(max(at_once // heads, 1), c["BLOCKS"] + c["TAIL"])
