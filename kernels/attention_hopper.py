"""Attention of short sequences for sm_90 in Gluon: one CTA a head, the whole head in shared memory, two CTAs an SM.

Legend: B batch, L tokens, H heads, D head dim (64, or 72 and 80 as 64 + 16 columns, `WIDE`). The tokens of a head are
`BLOCKS` blocks of 64 rows and, where at most 16 are left over (258 = 4 * 64 + 2), a `TAIL` of 16 rows; else the last block is
`RAGGED`. TMA reads q, k and v straight from packed qkv and fills what lies past row L or column D with zeros.

The backward has two phases and no atomics. Phase A: k and v stay, query blocks stream past, each leaves its dq and delta.
Phase B: q and dout stay, key blocks stream past, each leaves dk and dv. A streamed block moves to registers at once, so that
its buffers can take the block before it out and the block after it in while the products run. The tail never streams: its
gradients (16 rows) grow beside each phase from 16-column products that are needed anyway.
Scores are held in base 2: p = exp2(s * scale * log2(e) - lse).
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = 1.4426950408889634
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # triton 3.6 has the second name

SWIZZLE_128 = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # 64 columns
SWIZZLE_32 = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))  # 16 columns
MMA_64 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
MMA_16 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]), 2))
LEFT_SMALL = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]), 2))
RIGHT_SMALL = gl.constexpr(gl.DotOperandLayout(1, gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]), 2))
SMALL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]))  # 16 rows, a quarter of the columns a warp


@gluon.jit
def _load(box, box_w, b, l, c, bar, to, to_w, WIDE: gl.constexpr, wanted=True):
    """Rows from l of column group c (q, k or v of one head) into shared memory, asynchronously."""
    tma.async_copy_global_to_shared(
        box, [b, l, c, 0], bar, to._reinterpret(box.dtype, box.block_type.shape, box.layout), wanted
    )
    if WIDE:
        tma.async_copy_global_to_shared(
            box_w, [b, l, c, 64], bar, to_w._reinterpret(box_w.dtype, box_w.block_type.shape, box_w.layout), wanted
        )


@gluon.jit
def _store(box, box_w, b, l, c, value, value_w, via, via_w, WIDE: gl.constexpr):
    """64 rows from registers through shared memory to global memory; TMA drops what lies past L or D."""
    via.store(value.to(box.dtype))
    if WIDE:
        via_w.store(value_w.to(box.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(box, [b, l, c, 0], via._reinterpret(box.dtype, box.block_type.shape, box.layout))
    if WIDE:
        tma.async_copy_shared_to_global(
            box_w, [b, l, c, 64], via_w._reinterpret(box_w.dtype, box_w.block_type.shape, box_w.layout)
        )


@gluon.jit
def _load_head(
    box,
    box_w,
    tail,
    tail_w,
    b,
    c,
    bar,
    to,
    to_w,
    to_t,
    to_tw,
    BLOCKS: gl.constexpr,
    TAIL: gl.constexpr,
    WIDE: gl.constexpr,
):
    """All rows of a head: its blocks and its tail."""
    for i in gl.static_range(BLOCKS):
        _load(box, box_w, b, i * 64, c, bar, to.index(i), to_w.index(i), WIDE)
    if TAIL:
        _load(tail, tail_w, b, BLOCKS * 64, c, bar, to_t, to_tw, WIDE)


@gluon.jit
def _rows_by_rows(x, x_w, y, y_w, N: gl.constexpr, WIDE: gl.constexpr):
    """x y^T, asynchronous: x (64, D) in registers or shared memory, y (N, D) in shared memory -> (64, N) fp32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    s = warpgroup_mma(x, y.permute([1, 0]), gl.zeros([64, N], gl.float32, layout), use_acc=False, is_async=True)
    if WIDE:
        s = warpgroup_mma(x_w, y_w.permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def _left(p, dtype: gl.constexpr):
    """Scores as the left operand of the next product: the same registers, halved."""
    return gl.convert_layout(p.to(dtype), LEFT)


@gluon.jit
def _accumulate(p, y, y_w, a, a_w, WIDE: gl.constexpr):
    """a + p y, asynchronous: p (64, N) a left operand, y (N, D) in shared memory."""
    a = warpgroup_mma(p, y, a, is_async=True)
    if WIDE:
        a_w = warpgroup_mma(p, y_w, a_w, is_async=True)
    return a, a_w


@gluon.jit
def attention_forward_kernel(
    box,  # qkv as (B, L, 3H, D) in boxes of 64 rows and 64 columns
    box_w,  # the same, 16 columns
    tail,  # 16 rows, 64 columns
    tail_w,  # 16 rows, 16 columns
    out,  # (B, L, H, D) in boxes of 64 rows, 64 columns
    out_w,  # the same, 16 columns
    lse,  # (B, H, L) fp32, base 2
    L,
    scale,  # D**-0.5 * log2(e)
    H: gl.constexpr,
    BLOCKS: gl.constexpr,
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
    WIDE: gl.constexpr,
    BN: gl.constexpr,  # keys a product: 64 times a power of two that divides BLOCKS
):
    dtype: gl.constexpr = box.dtype
    ROW: gl.constexpr = 160 if WIDE else 128  # bytes
    HEAD: gl.constexpr = (BLOCKS * 64 + (16 if TAIL else 0)) * ROW
    NK: gl.constexpr = BLOCKS * 64 // BN
    QUERIES: gl.constexpr = BLOCKS + (1 if TAIL else 0)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    row: gl.constexpr = gl.SliceLayout(1, mma)
    row_64: gl.constexpr = gl.SliceLayout(1, MMA_64)
    row_16: gl.constexpr = gl.SliceLayout(1, MMA_16)

    k = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 64], SWIZZLE_128)
    v = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 64], SWIZZLE_128)
    q = gl.allocate_shared_memory(dtype, [2, 64, 64], SWIZZLE_128)
    k_w, v_w, q_w, k_t, v_t, k_tw, v_tw = k, v, q, k, v, k, v
    if WIDE:
        k_w = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 16], SWIZZLE_32)
        v_w = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 16], SWIZZLE_32)
        q_w = gl.allocate_shared_memory(dtype, [2, 64, 16], SWIZZLE_32)
    if TAIL:
        k_t = gl.allocate_shared_memory(dtype, [16, 64], SWIZZLE_128)
        v_t = gl.allocate_shared_memory(dtype, [16, 64], SWIZZLE_128)
        k_tw, v_tw = k_t, v_t
        if WIDE:
            k_tw = gl.allocate_shared_memory(dtype, [16, 16], SWIZZLE_32)
            v_tw = gl.allocate_shared_memory(dtype, [16, 16], SWIZZLE_32)
    bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())  # two of q, k, v
    for n in gl.static_range(4):
        mbarrier.init(bars.index(n), count=1)

    head = gl.program_id(0)
    b = head // H
    h = head % H
    mbarrier.expect(bars.index(0), 64 * ROW)
    _load(box, box_w, b, 0, h, bars.index(0), q.index(0), q_w.index(0), WIDE)
    mbarrier.expect(bars.index(2), HEAD)
    _load_head(box, box_w, tail, tail_w, b, H + h, bars.index(2), k, k_w, k_t, k_tw, BLOCKS, TAIL, WIDE)
    mbarrier.expect(bars.index(3), HEAD)
    _load_head(box, box_w, tail, tail_w, b, 2 * H + h, bars.index(3), v, v_w, v_t, v_tw, BLOCKS, TAIL, WIDE)
    if QUERIES > 1:
        mbarrier.expect(bars.index(1), 64 * ROW)
        _load(box, box_w, b, 64, h, bars.index(1), q.index(1), q_w.index(1), WIDE)

    ks = k._reinterpret(dtype, [NK, BN, 64], SWIZZLE_128)
    vs = v._reinterpret(dtype, [NK, BN, 64], SWIZZLE_128)
    ks_w, vs_w = ks, vs
    if WIDE:
        ks_w = k_w._reinterpret(dtype, [NK, BN, 16], SWIZZLE_32)
        vs_w = v_w._reinterpret(dtype, [NK, BN, 16], SWIZZLE_32)
    keys_t = BLOCKS * 64 + gl.arange(0, 16, layout=gl.SliceLayout(0, MMA_16))
    for i in range(QUERIES):
        u = i & 1
        mbarrier.wait(bars.index(u), (i // 2) & 1)
        mbarrier.wait(bars.index(2), 0)
        m = gl.full([64], float("-inf"), gl.float32, row)
        total = gl.zeros([64], gl.float32, row)
        o = gl.zeros([64, 64], gl.float32, MMA_64)
        o_w = gl.zeros([64, 16], gl.float32, MMA_16)
        for j in gl.static_range(NK):
            s = _rows_by_rows(q.index(u), q_w.index(u), ks.index(j), ks_w.index(j), BN, WIDE)
            if TAIL and j == NK - 1:
                t = _rows_by_rows(q.index(u), q_w.index(u), k_t, k_tw, 16, WIDE)
                s, t = warpgroup_mma_wait(0, deps=(s, t))
                t = gl.where(gl.expand_dims(keys_t < L, 0), t, float("-inf"))
            else:
                s = warpgroup_mma_wait(0, deps=(s,))
            if j == 0 and i > 0:
                # the other buffer has held the output of the block before this one: by now that has left
                tma.store_wait(0)
                if i + 1 < QUERIES:
                    mbarrier.expect(bars.index(1 - u), 64 * ROW)
                    _load(box, box_w, b, (i + 1) * 64, h, bars.index(1 - u), q.index(1 - u), q_w.index(1 - u), WIDE)
            if RAGGED:
                keys = j * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, mma))
                s = gl.where(gl.expand_dims(keys < L, 0), s, float("-inf"))
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
                o = o * gl.expand_dims(gl.convert_layout(shrink, row_64), 1)
                if WIDE:
                    o_w = o_w * gl.expand_dims(gl.convert_layout(shrink, row_16), 1)
            p = _left(p, dtype)
            if j == 0:
                mbarrier.wait(bars.index(3), 0)
            o, o_w = _accumulate(p, vs.index(j), vs_w.index(j), o, o_w, WIDE)
            if TAIL and j == NK - 1:
                t = gl.exp2(t * scale - gl.expand_dims(gl.convert_layout(m, row_16), 1))
                total += gl.convert_layout(gl.sum(t, 1), row)
                o, o_w = _accumulate(_left(t, dtype), v_t, v_tw, o, o_w, WIDE)
            if WIDE:
                o, o_w = warpgroup_mma_wait(0, deps=(o, o_w))
            else:
                o = warpgroup_mma_wait(0, deps=(o,))
        rows = i * 64 + gl.arange(0, 64, layout=row)
        gl.store(lse + head * L + rows, m + gl.log2(total), mask=rows < L)
        total = 1.0 / total
        o = o * gl.expand_dims(gl.convert_layout(total, row_64), 1)
        if WIDE:
            o_w = o_w * gl.expand_dims(gl.convert_layout(total, row_16), 1)
        _store(out, out_w, b, i * 64, h, o, o_w, q.index(u), q_w.index(u), WIDE)
    tma.store_wait(0)


@gluon.jit
def _start(p, y, y_w, WIDE: gl.constexpr):
    """p y, asynchronous, into new accumulators: p (64, N) a left operand, y (N, D) in shared memory."""
    a = warpgroup_mma(p, y, gl.zeros([64, 64], gl.float32, MMA_64), use_acc=False, is_async=True)
    a_w = a
    if WIDE:
        a_w = warpgroup_mma(p, y_w, gl.zeros([64, 16], gl.float32, MMA_16), use_acc=False, is_async=True)
    return a, a_w


@gluon.jit
def _step(
    x, x_w, y, y_w, k, k_w, v, v_w, lse, delta, first, L, scale, a, a_w, c, c_w,
    N: gl.constexpr, NEW: gl.constexpr, COLUMNS: gl.constexpr, MASKED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """A block of 64 streamed rows (x, y) against N resident rows (k, v), whose products are left in flight.

    Phase A: x = q, y = dout, and a (dq) grows by ds k. Phase B (COLUMNS: lse and delta belong to the resident rows, and are in
    shared memory): x = k, y = v, k = q, v = dout; a (dk) grows by ds q and c (dv) by p dout. NEW: a and c begin here.
    """
    axis: gl.constexpr = 0 if COLUMNS else 1
    s = _rows_by_rows(x, x_w, k, k_w, N, WIDE)
    dp = _rows_by_rows(y, y_w, v, v_w, N, WIDE)
    behind: gl.constexpr = 2 if WIDE else 1  # products that dp may still be behind by
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    if NEW:
        s = warpgroup_mma_wait(behind, deps=(s,))
    elif COLUMNS:
        if WIDE:
            s, a, a_w, c, c_w = warpgroup_mma_wait(behind, deps=(s, a, a_w, c, c_w))
        else:
            s, a, c = warpgroup_mma_wait(behind, deps=(s, a, c))
    else:
        if WIDE:
            s, a, a_w = warpgroup_mma_wait(behind, deps=(s, a, a_w))
        else:
            s, a = warpgroup_mma_wait(behind, deps=(s, a))
    if COLUMNS:
        lse = lse.load(gl.SliceLayout(0, mma))  # not before: it would take the registers that the products need
    p = gl.exp2(s * scale - gl.expand_dims(lse, axis))
    if MASKED:
        # a padded key scores 0, and exp2(0 - lse) is infinite when every real score is very negative
        keys = first + gl.arange(0, N, layout=gl.SliceLayout(0, mma))
        p = gl.where(gl.expand_dims(keys < L, 0), p, 0.0)
    if COLUMNS:
        if NEW:
            c, c_w = _start(_left(p, k.dtype), v, v_w, WIDE)
        else:
            c, c_w = _accumulate(_left(p, k.dtype), v, v_w, c, c_w, WIDE)
        delta = delta.load(gl.SliceLayout(0, mma))
        dp = warpgroup_mma_wait(behind, deps=(dp,))
    else:
        dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = _left(p * (dp - gl.expand_dims(delta, axis)), k.dtype)
    if NEW:
        a, a_w = _start(ds, k, k_w, WIDE)
    else:
        a, a_w = _accumulate(ds, k, k_w, a, a_w, WIDE)
    if not COLUMNS:
        c, c_w = a, a_w
    return a, a_w, c, c_w


@gluon.jit
def _to_registers(x, x_w, layout: gl.constexpr, WIDE: gl.constexpr):
    """A block in shared memory as left operands."""
    left = x.load(layout)
    left_w = left
    if WIDE:
        left_w = x_w.load(layout)
    return left, left_w


@gluon.jit
def _tail_rows_by_rows(x, x_w, y, y_w, N: gl.constexpr, WIDE: gl.constexpr):
    """x y^T: x (16, D) left operands, y (N, D) in shared memory -> (16, N) fp32."""
    s = mma_v2(x, y.permute([1, 0]).load(RIGHT_SMALL), gl.zeros([16, N], gl.float32, SMALL))
    if WIDE:
        s = mma_v2(x_w, y_w.permute([1, 0]).load(RIGHT_SMALL), s)
    return s


@gluon.jit
def _tail_accumulate(p, y, y_w, a, a_w, WIDE: gl.constexpr):
    """a + p y: p (16, N) scores, y (N, D) in shared memory, a (16, D)."""
    p = gl.convert_layout(p.to(y.dtype), LEFT_SMALL)
    a = mma_v2(p, y.load(RIGHT_SMALL), a)
    if WIDE:
        a_w = mma_v2(p, y_w.load(RIGHT_SMALL), a_w)
    return a, a_w


@gluon.jit
def _tail_step(
    x, x_w, y, y_w, k, k_w, v, v_w, lse, delta, first, L, scale, a, a_w, c, c_w,
    N: gl.constexpr, COLUMNS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """`_step` for the 16 rows of the tail."""
    axis: gl.constexpr = 0 if COLUMNS else 1
    s = _tail_rows_by_rows(x, x_w, k, k_w, N, WIDE)
    dp = _tail_rows_by_rows(y, y_w, v, v_w, N, WIDE)
    if COLUMNS:
        lse = lse.load(gl.SliceLayout(0, SMALL))
        delta = delta.load(gl.SliceLayout(0, SMALL))
    p = gl.exp2(s * scale - gl.expand_dims(lse, axis))
    if COLUMNS:
        c, c_w = _tail_accumulate(p, v, v_w, c, c_w, WIDE)
    else:
        keys = first + gl.arange(0, N, layout=gl.SliceLayout(0, SMALL))
        p = gl.where(gl.expand_dims(keys < L, 0), p, 0.0)
    a, a_w = _tail_accumulate(p * (dp - gl.expand_dims(delta, axis)), k, k_w, a, a_w, WIDE)
    return a, a_w, c, c_w


@gluon.jit
def _tail_round(
    x, x_w, y, y_w, k, k_w, v, v_w, k_t, k_tw, v_t, v_tw, lse, delta, lse_t, delta_t, L, scale,
    BLOCKS: gl.constexpr, COLUMNS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """A whole round for the 16 rows of the tail (x, y): dq in phase A, dk and dv in phase B, each (16, D)."""
    a = gl.zeros([16, 64], gl.float32, SMALL)
    a_w = gl.zeros([16, 16], gl.float32, SMALL)
    c = a
    c_w = a_w
    for j in range(BLOCKS):
        a, a_w, c, c_w = _tail_step(
            x, x_w, y, y_w, k.index(j), k_w.index(j), v.index(j), v_w.index(j),
            lse.index(j) if COLUMNS else lse, delta.index(j) if COLUMNS else delta, j * 64, L, scale,
            a, a_w, c, c_w, 64, COLUMNS, WIDE,
        )  # fmt: skip
    return _tail_step(
        x, x_w, y, y_w, k_t, k_tw, v_t, v_tw, lse_t, delta_t, BLOCKS * 64, L, scale, a, a_w, c, c_w, 16, COLUMNS, WIDE
    )


@gluon.jit
def _tail_store(pointer, value, value_w, first, L, stride, D: gl.constexpr):
    """The tail's gradient (16, D) straight to global memory: at most 16 rows."""
    rows = first + gl.arange(0, 16, layout=gl.SliceLayout(1, SMALL))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, SMALL))
    at = pointer + gl.expand_dims(rows, 1) * stride
    inside = gl.expand_dims(rows < L, 1)
    gl.store(at + gl.expand_dims(columns, 0), value.to(pointer.dtype.element_ty), mask=inside)
    if D > 64:
        columns_w = 64 + gl.arange(0, 16, layout=gl.SliceLayout(0, SMALL))
        inside = inside & gl.expand_dims(columns_w < D, 0)
        gl.store(at + gl.expand_dims(columns_w, 0), value_w.to(pointer.dtype.element_ty), mask=inside)


@gluon.jit
def _zeros(WIDE: gl.constexpr):
    a = gl.zeros([64, 64], gl.float32, MMA_64)
    a_w = a
    if WIDE:
        a_w = gl.zeros([64, 16], gl.float32, MMA_16)
    return a, a_w


@gluon.jit
def _statistic(pointer, first, L, other, N: gl.constexpr, layout: gl.constexpr):
    """lse or delta of N rows; past row L infinite and 0: a padded query weighs nothing."""
    at = first + gl.arange(0, N, layout=layout)
    return gl.load(pointer + at, mask=at < L, other=other)


@gluon.jit
def _keep(pointer, L, other, keep, keep_t, BLOCKS: gl.constexpr, TAIL: gl.constexpr):
    """lse or delta of a head into shared memory, in blocks of 64 rows and the tail."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for n in gl.static_range(BLOCKS):
        keep.index(n).store(_statistic(pointer, n * 64, L, other, 64, layout))
    if TAIL:
        keep_t.store(_statistic(pointer, BLOCKS * 64, L, other, 16, layout))


@gluon.jit
def _settle(a, a_w, factor, WIDE: gl.constexpr):
    """Wait for every product in flight; a * factor."""
    if WIDE:
        a, a_w = warpgroup_mma_wait(0, deps=(a, a_w))
        a_w = a_w * factor
    else:
        a = warpgroup_mma_wait(0, deps=(a,))
        a_w = a
    return a * factor, a_w


@gluon.jit
def _out_rows(out, first, L, stride, ROWS: gl.constexpr, D: gl.constexpr):
    """Rows of the forward's output as pairs of values: a pair a register, where single ones would take twice as many."""
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [4, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, 32, layout=gl.SliceLayout(0, wide))
    at = gl.expand_dims(rows, 1) * stride + gl.expand_dims(columns, 0)
    o = gl.load(out + at, mask=gl.expand_dims(rows < L, 1), other=0)
    o_w = o
    if D > 64:
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, narrow))
        columns = 32 + gl.arange(0, 8, layout=gl.SliceLayout(0, narrow))
        at = gl.expand_dims(rows, 1) * stride + gl.expand_dims(columns, 0)
        o_w = gl.load(out + at, mask=gl.expand_dims(rows < L, 1) & gl.expand_dims(columns < D // 2, 0), other=0)
    return o, o_w


@gluon.jit
def _dot_pairs(x, y, dtype: gl.constexpr, layout: gl.constexpr):
    """Row sums of x * y, both pairs of `dtype` values in int32."""
    low = x.to(gl.int16).to(dtype, bitcast=True).to(gl.float32) * y.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    x = (x >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    y = (y >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return gl.convert_layout(gl.sum(low + x * y, 1), layout)


@gluon.jit
def _delta(o, o_w, dout, dout_w, ROWS: gl.constexpr, layout: gl.constexpr, WIDE: gl.constexpr):
    """delta (ROWS,) = sum over d of dout * out: dout in shared memory, out as `_out_rows` gave it."""
    pairs = (
        dout._reinterpret(gl.int32, [64 // ROWS, ROWS, 32], gl.NVMMASharedLayout(128, 32, 2))
        .index(0)
        .load(o.type.layout)
    )
    delta = _dot_pairs(o, pairs, dout.dtype, layout)
    if WIDE:
        pairs = (
            dout_w._reinterpret(gl.int32, [64 // ROWS, ROWS, 8], gl.NVMMASharedLayout(32, 32, 2))
            .index(0)
            .load(o_w.type.layout)
        )
        delta += _dot_pairs(o_w, pairs, dout.dtype, layout)
    return delta


@gluon.jit
def attention_dq_kernel(
    box,  # qkv as (B, L, 3H, D) in boxes of 64 rows and 64 columns
    box_w,  # the same, 16 columns
    tail,  # 16 rows, 64 columns
    tail_w,  # 16 rows, 16 columns
    dbox,  # dout as (B, L, H, D) in boxes of 64 rows, 64 columns
    dbox_w,  # the same, 16 columns
    grad,  # dqkv as (B, L, 3H, D), likewise; its q part is written
    grad_w,
    out,  # (B, L, H, D / 2) pairs of values as int32
    dqkv,  # (B, L, 3, H, D)
    lse,  # (B, H, L) fp32, base 2
    delta,  # (B, H, L) fp32, written
    L,
    scale,  # D**-0.5 * log2(e)
    factor,  # D**-0.5
    D: gl.constexpr,
    H: gl.constexpr,
    BLOCKS: gl.constexpr,
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Phase A: dq and delta."""
    dtype: gl.constexpr = box.dtype
    ROW: gl.constexpr = 160 if WIDE else 128  # bytes
    HEAD: gl.constexpr = (BLOCKS * 64 + (16 if TAIL else 0)) * ROW
    row: gl.constexpr = gl.SliceLayout(1, MMA_64)
    row_16: gl.constexpr = gl.SliceLayout(1, MMA_16)

    x = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 64], SWIZZLE_128)  # k
    y = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 64], SWIZZLE_128)  # v
    u = gl.allocate_shared_memory(dtype, [64, 64], SWIZZLE_128)  # a block of q
    w = gl.allocate_shared_memory(dtype, [64, 64], SWIZZLE_128)  # a block of dout
    x_w, y_w, u_w, w_w, x_t, y_t, x_tw, y_tw = x, y, u, w, x, y, x, y
    if WIDE:
        x_w = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 16], SWIZZLE_32)
        y_w = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 16], SWIZZLE_32)
        u_w = gl.allocate_shared_memory(dtype, [64, 16], SWIZZLE_32)
        w_w = gl.allocate_shared_memory(dtype, [64, 16], SWIZZLE_32)
    if TAIL:
        x_t = gl.allocate_shared_memory(dtype, [16, 64], SWIZZLE_128)
        y_t = gl.allocate_shared_memory(dtype, [16, 64], SWIZZLE_128)
        x_tw, y_tw = x_t, y_t
        if WIDE:
            x_tw = gl.allocate_shared_memory(dtype, [16, 16], SWIZZLE_32)
            y_tw = gl.allocate_shared_memory(dtype, [16, 16], SWIZZLE_32)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    stays = bars.index(0)
    streams = bars.index(1)
    mbarrier.init(stays, count=1)
    mbarrier.init(streams, count=1)

    head = gl.program_id(0)
    b = head // H
    h = head % H
    outs = out + b.to(gl.int64) * L * (H * D // 2) + h * (D // 2)
    lses = lse + head * L
    deltas = delta + head * L
    grads = dqkv + b.to(gl.int64) * L * (3 * H * D) + h * D
    START: gl.constexpr = BLOCKS * 64 if TAIL else 0  # the tail goes first
    PAIRS: gl.constexpr = H * D // 2  # of a row of out
    ROUNDS: gl.constexpr = BLOCKS + (1 if TAIL else 0)
    FIRST: gl.constexpr = 0 if TAIL else 1  # the first resident block of a round's loop
    row_small: gl.constexpr = gl.SliceLayout(1, SMALL)
    u_t = u._reinterpret(dtype, [4, 16, 64], SWIZZLE_128).index(0)  # where the tail's rows arrive
    w_t = w._reinterpret(dtype, [4, 16, 64], SWIZZLE_128).index(0)
    u_tw, w_tw = u_t, w_t
    if WIDE:
        u_tw = u_w._reinterpret(dtype, [4, 16, 16], SWIZZLE_32).index(0)
        w_tw = w_w._reinterpret(dtype, [4, 16, 16], SWIZZLE_32).index(0)

    mbarrier.expect(streams, 128 * ROW)
    _load(box, box_w, b, START, h, streams, u, u_w, WIDE)
    _load(dbox, dbox_w, b, START, h, streams, w, w_w, WIDE)
    mbarrier.expect(stays, 2 * HEAD)
    _load_head(box, box_w, tail, tail_w, b, H + h, stays, x, x_w, x_t, x_tw, BLOCKS, TAIL, WIDE)
    _load_head(box, box_w, tail, tail_w, b, 2 * H + h, stays, y, y_w, y_t, y_tw, BLOCKS, TAIL, WIDE)
    if TAIL:
        o_t, o_tw = _out_rows(outs, START, L, PAIRS, 16, D)
        mbarrier.wait(streams, 0)
        at = START + gl.arange(0, 16, layout=row_small)
        dl_t = _delta(o_t, o_tw, w, w_w, 16, row_small, WIDE)
        gl.store(deltas + at, dl_t, mask=at < L)
        ls_t = _statistic(lses, START, L, float("inf"), 16, row_small)
        q_t, q_tw = _to_registers(u_t, u_tw, LEFT_SMALL, WIDE)
        g_t, g_tw = _to_registers(w_t, w_tw, LEFT_SMALL, WIDE)
        barrier()
        mbarrier.expect(streams, 128 * ROW)
        _load(box, box_w, b, 0, h, streams, u, u_w, WIDE)
        _load(dbox, dbox_w, b, 0, h, streams, w, w_w, WIDE)
        mbarrier.wait(stays, 0)
        t, t_w, _t, _t_w = _tail_round(
            q_t,
            q_tw,
            g_t,
            g_tw,
            x,
            x_w,
            y,
            y_w,
            x_t,
            x_tw,
            y_t,
            y_tw,
            ls_t,
            dl_t,
            ls_t,
            dl_t,
            L,
            scale,
            BLOCKS,
            False,
            WIDE,
        )
        _tail_store(grads, t * factor, t_w * factor, START, L, 3 * H * D, D)
    o, o_w = _out_rows(outs, 0, L, PAIRS, 64, D)
    a, a_w = _zeros(WIDE)
    mbarrier.wait(stays, 0)
    for i in range(BLOCKS):
        mbarrier.wait(streams, (i + ROUNDS - BLOCKS) & 1)
        rows = i * 64 + gl.arange(0, 64, layout=row)
        dl = _delta(o, o_w, w, w_w, 64, row, WIDE)
        gl.store(deltas + rows, dl, mask=rows < L)
        ls = _statistic(lses, i * 64, L, float("inf"), 64, row)
        q, q_w = _to_registers(u, u_w, LEFT, WIDE)
        g, g_w = _to_registers(w, w_w, LEFT, WIDE)
        if i > 0:
            _store(grad, grad_w, b, (i - 1) * 64, h, a, a_w, u, u_w, WIDE)
        if TAIL:
            f, f_w, _c, _c_w = _step(
                q, q_w, g, g_w, x_t, x_tw, y_t, y_tw, gl.convert_layout(ls, row_16), gl.convert_layout(dl, row_16), START,
                L, scale, q, q, q, q, 16, True, False, True, WIDE,
            )  # fmt: skip
        else:
            f, f_w, _c, _c_w = _step(
                q, q_w, g, g_w, x.index(0), x_w.index(0), y.index(0), y_w.index(0), ls, dl, 0, L, scale, q, q, q, q,
                64, True, False, RAGGED, WIDE,
            )  # fmt: skip
        # the block has moved to registers and the one before it out: its buffers take the next one
        tma.store_wait(0)
        barrier()
        more = i + 1 < BLOCKS
        mbarrier.expect(streams, 128 * ROW, pred=more)
        _load(box, box_w, b, (i + 1) * 64, h, streams, u, u_w, WIDE, more)
        _load(dbox, dbox_w, b, (i + 1) * 64, h, streams, w, w_w, WIDE, more)
        for j in range(FIRST, BLOCKS):
            f, f_w, _c, _c_w = _step(
                q, q_w, g, g_w, x.index(j), x_w.index(j), y.index(j), y_w.index(j), ls, dl, j * 64, L, scale, f, f_w, f, f_w,
                64, False, False, RAGGED, WIDE,
            )  # fmt: skip
        o, o_w = _out_rows(outs, (i + 1) * 64, L, PAIRS, 64, D)
        a, a_w = _settle(f, f_w, factor, WIDE)
    _store(grad, grad_w, b, (BLOCKS - 1) * 64, h, a, a_w, u, u_w, WIDE)
    tma.store_wait(0)


@gluon.jit
def attention_dkv_kernel(
    box,  # qkv as (B, L, 3H, D) in boxes of 64 rows and 64 columns
    box_w,  # the same, 16 columns
    tail,  # 16 rows, 64 columns
    tail_w,  # 16 rows, 16 columns
    dbox,  # dout as (B, L, H, D) in the same four boxes
    dbox_w,
    dtail,
    dtail_w,
    grad,  # dqkv as (B, L, 3H, D) in boxes of 64 rows, 64 columns; its k and v parts are written
    grad_w,  # the same, 16 columns
    dqkv,  # (B, L, 3, H, D)
    lse,  # (B, H, L) fp32, base 2
    delta,  # (B, H, L) fp32, from phase A
    L,
    scale,  # D**-0.5 * log2(e)
    factor,  # D**-0.5
    D: gl.constexpr,
    H: gl.constexpr,
    BLOCKS: gl.constexpr,
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Phase B: dk and dv."""
    dtype: gl.constexpr = box.dtype
    ROW: gl.constexpr = 160 if WIDE else 128  # bytes
    HEAD: gl.constexpr = (BLOCKS * 64 + (16 if TAIL else 0)) * ROW

    x = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 64], SWIZZLE_128)  # q
    y = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 64], SWIZZLE_128)  # dout
    u = gl.allocate_shared_memory(dtype, [64, 64], SWIZZLE_128)  # a block of k
    w = gl.allocate_shared_memory(dtype, [64, 64], SWIZZLE_128)  # a block of v
    x_w, y_w, u_w, w_w, x_t, y_t, x_tw, y_tw = x, y, u, w, x, y, x, y
    if WIDE:
        x_w = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 16], SWIZZLE_32)
        y_w = gl.allocate_shared_memory(dtype, [BLOCKS, 64, 16], SWIZZLE_32)
        u_w = gl.allocate_shared_memory(dtype, [64, 16], SWIZZLE_32)
        w_w = gl.allocate_shared_memory(dtype, [64, 16], SWIZZLE_32)
    if TAIL:
        x_t = gl.allocate_shared_memory(dtype, [16, 64], SWIZZLE_128)
        y_t = gl.allocate_shared_memory(dtype, [16, 64], SWIZZLE_128)
        x_tw, y_tw = x_t, y_t
        if WIDE:
            x_tw = gl.allocate_shared_memory(dtype, [16, 16], SWIZZLE_32)
            y_tw = gl.allocate_shared_memory(dtype, [16, 16], SWIZZLE_32)
    ls = gl.allocate_shared_memory(gl.float32, [BLOCKS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    dl = gl.allocate_shared_memory(gl.float32, [BLOCKS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ls_t = gl.allocate_shared_memory(gl.float32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    dl_t = gl.allocate_shared_memory(gl.float32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    stays = bars.index(0)
    streams = bars.index(1)
    mbarrier.init(stays, count=1)
    mbarrier.init(streams, count=1)

    head = gl.program_id(0)
    b = head // H
    h = head % H
    lses = lse + head * L
    deltas = delta + head * L
    grads = dqkv + b.to(gl.int64) * L * (3 * H * D) + h * D
    START: gl.constexpr = BLOCKS * 64 if TAIL else 0  # the tail goes first
    ROUNDS: gl.constexpr = BLOCKS + (1 if TAIL else 0)
    FIRST: gl.constexpr = 0 if TAIL else 1  # the first resident block of a round's loop
    u_t = u._reinterpret(dtype, [4, 16, 64], SWIZZLE_128).index(0)  # where the tail's rows arrive
    w_t = w._reinterpret(dtype, [4, 16, 64], SWIZZLE_128).index(0)
    u_tw, w_tw = u_t, w_t
    if WIDE:
        u_tw = u_w._reinterpret(dtype, [4, 16, 16], SWIZZLE_32).index(0)
        w_tw = w_w._reinterpret(dtype, [4, 16, 16], SWIZZLE_32).index(0)

    mbarrier.expect(streams, 128 * ROW)
    _load(box, box_w, b, START, H + h, streams, u, u_w, WIDE)
    _load(box, box_w, b, START, 2 * H + h, streams, w, w_w, WIDE)
    mbarrier.expect(stays, 2 * HEAD)
    _load_head(box, box_w, tail, tail_w, b, h, stays, x, x_w, x_t, x_tw, BLOCKS, TAIL, WIDE)
    _load_head(dbox, dbox_w, dtail, dtail_w, b, h, stays, y, y_w, y_t, y_tw, BLOCKS, TAIL, WIDE)
    _keep(lses, L, float("inf"), ls, ls_t, BLOCKS, TAIL)
    _keep(deltas, L, 0.0, dl, dl_t, BLOCKS, TAIL)
    if TAIL:
        mbarrier.wait(streams, 0)
        k_t, k_tw = _to_registers(u_t, u_tw, LEFT_SMALL, WIDE)
        v_t, v_tw = _to_registers(w_t, w_tw, LEFT_SMALL, WIDE)
        barrier()
        mbarrier.expect(streams, 128 * ROW)
        _load(box, box_w, b, 0, H + h, streams, u, u_w, WIDE)
        _load(box, box_w, b, 0, 2 * H + h, streams, w, w_w, WIDE)
        mbarrier.wait(stays, 0)
        t, t_w, r, r_w = _tail_round(
            k_t, k_tw, v_t, v_tw, x, x_w, y, y_w, x_t, x_tw, y_t, y_tw, ls, dl, ls_t, dl_t, L, scale, BLOCKS, True, WIDE
        )
        _tail_store(grads + H * D, t * factor, t_w * factor, START, L, 3 * H * D, D)
        _tail_store(grads + 2 * H * D, r, r_w, START, L, 3 * H * D, D)
    a, a_w = _zeros(WIDE)
    c, c_w = _zeros(WIDE)
    mbarrier.wait(stays, 0)
    for i in range(BLOCKS):
        mbarrier.wait(streams, (i + ROUNDS - BLOCKS) & 1)
        k, k_w = _to_registers(u, u_w, LEFT, WIDE)
        v, v_w = _to_registers(w, w_w, LEFT, WIDE)
        if i > 0:
            _store(grad, grad_w, b, (i - 1) * 64, H + h, a, a_w, u, u_w, WIDE)
            _store(grad, grad_w, b, (i - 1) * 64, 2 * H + h, c, c_w, w, w_w, WIDE)
        if TAIL:
            f, f_w, d, d_w = _step(
                k, k_w, v, v_w, x_t, x_tw, y_t, y_tw, ls_t, dl_t, 0, L, scale, k, k, k, k, 16, True, True, False, WIDE
            )
        else:
            f, f_w, d, d_w = _step(
                k, k_w, v, v_w, x.index(0), x_w.index(0), y.index(0), y_w.index(0), ls.index(0), dl.index(0), 0, L, scale, k, k, k, k,
                64, True, True, False, WIDE,
            )  # fmt: skip
        tma.store_wait(0)
        barrier()
        more = i + 1 < BLOCKS
        mbarrier.expect(streams, 128 * ROW, pred=more)
        _load(box, box_w, b, (i + 1) * 64, H + h, streams, u, u_w, WIDE, more)
        _load(box, box_w, b, (i + 1) * 64, 2 * H + h, streams, w, w_w, WIDE, more)
        for j in range(FIRST, BLOCKS):
            f, f_w, d, d_w = _step(
                k, k_w, v, v_w, x.index(j), x_w.index(j), y.index(j), y_w.index(j), ls.index(j), dl.index(j), 0, L, scale, f, f_w, d, d_w,
                64, False, True, False, WIDE,
            )  # fmt: skip
        a, a_w = _settle(f, f_w, factor, WIDE)
        c, c_w = _settle(d, d_w, 1.0, WIDE)
    _store(grad, grad_w, b, (BLOCKS - 1) * 64, H + h, a, a_w, u, u_w, WIDE)
    _store(grad, grad_w, b, (BLOCKS - 1) * 64, 2 * H + h, c, c_w, w, w_w, WIDE)
    tma.store_wait(0)


def shape_constants(L: int, H: int, D: int) -> dict[str, int | bool]:
    """How L tokens are cut: whole blocks of 64, then a tail of at most 16, or a ragged last block."""
    tail = L > 64 and 0 < L % 64 <= 16
    return {
        "H": H,
        "BLOCKS": L // 64 if tail else triton.cdiv(L, 64),
        "TAIL": tail,
        "RAGGED": not tail and L % 64 > 0,
        "WIDE": D > 64,
    }


def _boxes(t: Tensor, groups: int, D: int, rows: tuple[int, ...]) -> list[TensorDescriptor | None]:
    """TMA views of t (B, L, groups * D) for boxes of so many rows, 64 columns and (where D needs them) 16."""
    t = t.view(t.shape[0], t.shape[1], groups, D)
    found = []
    for n in rows:
        found.append(TensorDescriptor.from_tensor(t, [1, n, 1, 64], gl.NVMMASharedLayout(128, 16, 4)))
        wide = TensorDescriptor.from_tensor(t, [1, n, 1, 16], gl.NVMMASharedLayout(32, 16, 4)) if D > 64 else None
        found.append(wide)
    return found


def _all_boxes(t: Tensor, groups: int, D: int, tail: bool) -> list[TensorDescriptor | None]:
    return _boxes(t, groups, D, (64, 16)) if tail else [*_boxes(t, groups, D, (64,)), None, None]


def forward_launch(qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[tuple, dict]:
    """Arguments and options of the forward kernel."""
    _, L, _, H, D = qkv.shape
    c = shape_constants(L, H, D)
    c["BN"] = 256 if c["BLOCKS"] % 4 == 0 else 128 if c["BLOCKS"] % 2 == 0 else 64
    boxes = _all_boxes(qkv, 3 * H, D, c["TAIL"]) + _boxes(out, H, D, (64,))
    return (*boxes, lse, L, D**-0.5 * LOG2E), {**c, "num_warps": 4}


def backward_launches(
    qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, delta: Tensor, dqkv: Tensor
) -> tuple[tuple, tuple, dict]:
    """Arguments of the two backward kernels, and their options."""
    _, L, _, H, D = qkv.shape
    c = shape_constants(L, H, D)
    q, do = _all_boxes(qkv, 3 * H, D, c["TAIL"]), _all_boxes(dout, H, D, c["TAIL"])
    grad = _boxes(dqkv, 3 * H, D, (64,))
    scalars = (L, D**-0.5 * LOG2E, D**-0.5, D)
    first = (*q, *do[:2], *grad, out.view(torch.int32), dqkv, lse, delta, *scalars)
    return first, (*q, *do, *grad, dqkv, lse, delta, *scalars), {**c, "num_warps": 4}


def launches(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, delta: Tensor, dqkv: Tensor) -> list[tuple]:
    """The kernels in the order in which they run: (name, arguments, options)."""
    first, second, options = backward_launches(qkv, out, lse, dout, delta, dqkv)
    return [
        ("attention_forward_kernel", *forward_launch(qkv, out, lse)),
        ("attention_dq_kernel", first, options),
        ("attention_dkv_kernel", second, options),
    ]


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """qkv (B, L, 3, H, D), contiguous -> out (B, L, H*D), lse (B, H, L) fp32 in base 2."""
    B, L, _, H, D = qkv.shape
    out = qkv.new_empty(B, L, H * D)
    lse = qkv.new_empty(B, H, L, dtype=torch.float32)
    arguments, options = forward_launch(qkv, out, lse)
    attention_forward_kernel[(B * H,)](*arguments, **options)
    return out, lse


def backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """The gradient of qkv, packed as qkv is; every argument contiguous."""
    B, _, _, H, _ = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    first, second, options = backward_launches(qkv, out, lse, dout, delta, dqkv)
    attention_dq_kernel[(B * H,)](*first, **options)
    attention_dkv_kernel[(B * H,)](*second, **options)
    return dqkv
