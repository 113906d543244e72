"""What the Hopper attention kernels are made of: blocks in and out, products of blocks, the 16 rows of a tail.

The legend is in sm90_forward.py. A name in `_w` is the same block's columns from 64 on (16 of them), there only where WIDE.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mma_v2,
    tma,
    warpgroup_mma,
)

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
def load_rows(box, box_w, b, l, c, bar, to, to_w, WIDE: gl.constexpr, wanted=True):
    """Rows from l of column group c (q, k or v of one head) into shared memory, asynchronously."""
    tma.async_copy_global_to_shared(
        box, [b, l, c, 0], bar, to._reinterpret(box.dtype, box.block_type.shape, box.layout), wanted
    )
    if WIDE:
        tma.async_copy_global_to_shared(
            box_w, [b, l, c, 64], bar, to_w._reinterpret(box_w.dtype, box_w.block_type.shape, box_w.layout), wanted
        )


@gluon.jit
def store_rows(box, box_w, b, l, c, value, value_w, via, via_w, WIDE: gl.constexpr):
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
def load_head(
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
        load_rows(box, box_w, b, i * 64, c, bar, to.index(i), to_w.index(i), WIDE)
    if TAIL:
        load_rows(tail, tail_w, b, BLOCKS * 64, c, bar, to_t, to_tw, WIDE)


@gluon.jit
def rows_by_rows(x, x_w, y, y_w, N: gl.constexpr, WIDE: gl.constexpr):
    """x y^T, asynchronous: x (64, D) in registers or shared memory, y (N, D) in shared memory -> (64, N) fp32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    s = warpgroup_mma(x, y.permute([1, 0]), gl.zeros([64, N], gl.float32, layout), use_acc=False, is_async=True)
    if WIDE:
        s = warpgroup_mma(x_w, y_w.permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def left(p, dtype: gl.constexpr):
    """Scores as the left operand of the next product: the same registers, halved."""
    return gl.convert_layout(p.to(dtype), LEFT)


@gluon.jit
def accumulate(p, y, y_w, a, a_w, WIDE: gl.constexpr):
    """a + p y, asynchronous: p (64, N) a left operand, y (N, D) in shared memory."""
    a = warpgroup_mma(p, y, a, is_async=True)
    if WIDE:
        a_w = warpgroup_mma(p, y_w, a_w, is_async=True)
    return a, a_w


@gluon.jit
def start(p, y, y_w, WIDE: gl.constexpr):
    """p y, asynchronous, into new accumulators: p (64, N) a left operand, y (N, D) in shared memory."""
    a = warpgroup_mma(p, y, gl.zeros([64, 64], gl.float32, MMA_64), use_acc=False, is_async=True)
    a_w = a
    if WIDE:
        a_w = warpgroup_mma(p, y_w, gl.zeros([64, 16], gl.float32, MMA_16), use_acc=False, is_async=True)
    return a, a_w


@gluon.jit
def to_registers(x, x_w, layout: gl.constexpr, WIDE: gl.constexpr):
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
def tail_round(
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
def tail_attend(
    x, x_w, k, k_w, v, v_w, via, first, L, scale, m, total, o, o_w,
    N: gl.constexpr, MASKED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """The 16 rows of the tail (queries x) take in N keys: running maximum, sum and output. `via` holds (16, N) scores."""
    s = _tail_rows_by_rows(x, x_w, k, k_w, N, WIDE) * scale
    if MASKED:
        keys = first + gl.arange(0, N, layout=gl.SliceLayout(0, SMALL))
        s = gl.where(gl.expand_dims(keys < L, 0), s, float("-inf"))
    new = gl.maximum(m, gl.max(s, 1))
    p = gl.exp2(s - gl.expand_dims(new, 1))
    shrink = gl.exp2(m - new)
    via.store(p.to(v.dtype))
    barrier()
    p_left = via.load(LEFT_SMALL)
    o = mma_v2(p_left, v.load(RIGHT_SMALL), o * gl.expand_dims(shrink, 1))
    if WIDE:
        o_w = mma_v2(p_left, v_w.load(RIGHT_SMALL), o_w * gl.expand_dims(shrink, 1))
    barrier()  # all of p is read: `via` may be written
    return new, total * shrink + gl.sum(p, 1), o, o_w


@gluon.jit
def tail_store(pointer, value, value_w, first, L, stride, D: gl.constexpr):
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
def statistic(pointer, first, L, other, N: gl.constexpr, layout: gl.constexpr):
    """lse or delta of N rows; past row L infinite and 0: a padded query weighs nothing."""
    at = first + gl.arange(0, N, layout=layout)
    return gl.load(pointer + at, mask=at < L, other=other)
