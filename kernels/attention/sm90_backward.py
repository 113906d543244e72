"""The backward of attention on sm_90: dq with delta, then dk and dv, each its own kernel; see sm90_forward.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from uvit_fast.kernels.attention.sm90_tiles import (
    LEFT,
    LEFT_SMALL,
    MMA_16,
    MMA_64,
    SMALL,
    SWIZZLE_32,
    SWIZZLE_128,
    accumulate,
    barrier,
    left,
    load_head,
    load_rows,
    rows_by_rows,
    start,
    statistic,
    store_rows,
    tail_round,
    tail_store,
    to_registers,
)


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
    s = rows_by_rows(x, x_w, k, k_w, N, WIDE)
    dp = rows_by_rows(y, y_w, v, v_w, N, WIDE)
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
            c, c_w = start(left(p, k.dtype), v, v_w, WIDE)
        else:
            c, c_w = accumulate(left(p, k.dtype), v, v_w, c, c_w, WIDE)
        delta = delta.load(gl.SliceLayout(0, mma))
        dp = warpgroup_mma_wait(behind, deps=(dp,))
    else:
        dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = left(p * (dp - gl.expand_dims(delta, axis)), k.dtype)
    if NEW:
        a, a_w = start(ds, k, k_w, WIDE)
    else:
        a, a_w = accumulate(ds, k, k_w, a, a_w, WIDE)
    if not COLUMNS:
        c, c_w = a, a_w
    return a, a_w, c, c_w


@gluon.jit
def _zeros(WIDE: gl.constexpr):
    a = gl.zeros([64, 64], gl.float32, MMA_64)
    a_w = a
    if WIDE:
        a_w = gl.zeros([64, 16], gl.float32, MMA_16)
    return a, a_w


@gluon.jit
def _keep(pointer, L, other, keep, keep_t, BLOCKS: gl.constexpr, TAIL: gl.constexpr):
    """lse or delta of a head into shared memory, in blocks of 64 rows and the tail."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for n in gl.static_range(BLOCKS):
        keep.index(n).store(statistic(pointer, n * 64, L, other, 64, layout))
    if TAIL:
        keep_t.store(statistic(pointer, BLOCKS * 64, L, other, 16, layout))


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
    load_rows(box, box_w, b, START, h, streams, u, u_w, WIDE)
    load_rows(dbox, dbox_w, b, START, h, streams, w, w_w, WIDE)
    mbarrier.expect(stays, 2 * HEAD)
    load_head(box, box_w, tail, tail_w, b, H + h, stays, x, x_w, x_t, x_tw, BLOCKS, TAIL, WIDE)
    load_head(box, box_w, tail, tail_w, b, 2 * H + h, stays, y, y_w, y_t, y_tw, BLOCKS, TAIL, WIDE)
    if TAIL:
        o_t, o_tw = _out_rows(outs, START, L, PAIRS, 16, D)
        mbarrier.wait(streams, 0)
        at = START + gl.arange(0, 16, layout=row_small)
        dl_t = _delta(o_t, o_tw, w, w_w, 16, row_small, WIDE)
        gl.store(deltas + at, dl_t, mask=at < L)
        ls_t = statistic(lses, START, L, float("inf"), 16, row_small)
        q_t, q_tw = to_registers(u_t, u_tw, LEFT_SMALL, WIDE)
        g_t, g_tw = to_registers(w_t, w_tw, LEFT_SMALL, WIDE)
        barrier()
        mbarrier.expect(streams, 128 * ROW)
        load_rows(box, box_w, b, 0, h, streams, u, u_w, WIDE)
        load_rows(dbox, dbox_w, b, 0, h, streams, w, w_w, WIDE)
        mbarrier.wait(stays, 0)
        t, t_w, _t, _t_w = tail_round(
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
        tail_store(grads, t * factor, t_w * factor, START, L, 3 * H * D, D)
    o, o_w = _out_rows(outs, 0, L, PAIRS, 64, D)
    a, a_w = _zeros(WIDE)
    mbarrier.wait(stays, 0)
    for i in range(BLOCKS):
        mbarrier.wait(streams, (i + ROUNDS - BLOCKS) & 1)
        rows = i * 64 + gl.arange(0, 64, layout=row)
        dl = _delta(o, o_w, w, w_w, 64, row, WIDE)
        gl.store(deltas + rows, dl, mask=rows < L)
        ls = statistic(lses, i * 64, L, float("inf"), 64, row)
        q, q_w = to_registers(u, u_w, LEFT, WIDE)
        g, g_w = to_registers(w, w_w, LEFT, WIDE)
        if i > 0:
            store_rows(grad, grad_w, b, (i - 1) * 64, h, a, a_w, u, u_w, WIDE)
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
        load_rows(box, box_w, b, (i + 1) * 64, h, streams, u, u_w, WIDE, more)
        load_rows(dbox, dbox_w, b, (i + 1) * 64, h, streams, w, w_w, WIDE, more)
        for j in range(FIRST, BLOCKS):
            f, f_w, _c, _c_w = _step(
                q, q_w, g, g_w, x.index(j), x_w.index(j), y.index(j), y_w.index(j), ls, dl, j * 64, L, scale, f, f_w, f, f_w,
                64, False, False, RAGGED, WIDE,
            )  # fmt: skip
        o, o_w = _out_rows(outs, (i + 1) * 64, L, PAIRS, 64, D)
        a, a_w = _settle(f, f_w, factor, WIDE)
    store_rows(grad, grad_w, b, (BLOCKS - 1) * 64, h, a, a_w, u, u_w, WIDE)
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
    load_rows(box, box_w, b, START, H + h, streams, u, u_w, WIDE)
    load_rows(box, box_w, b, START, 2 * H + h, streams, w, w_w, WIDE)
    mbarrier.expect(stays, 2 * HEAD)
    load_head(box, box_w, tail, tail_w, b, h, stays, x, x_w, x_t, x_tw, BLOCKS, TAIL, WIDE)
    load_head(dbox, dbox_w, dtail, dtail_w, b, h, stays, y, y_w, y_t, y_tw, BLOCKS, TAIL, WIDE)
    _keep(lses, L, float("inf"), ls, ls_t, BLOCKS, TAIL)
    _keep(deltas, L, 0.0, dl, dl_t, BLOCKS, TAIL)
    if TAIL:
        mbarrier.wait(streams, 0)
        k_t, k_tw = to_registers(u_t, u_tw, LEFT_SMALL, WIDE)
        v_t, v_tw = to_registers(w_t, w_tw, LEFT_SMALL, WIDE)
        barrier()
        mbarrier.expect(streams, 128 * ROW)
        load_rows(box, box_w, b, 0, H + h, streams, u, u_w, WIDE)
        load_rows(box, box_w, b, 0, 2 * H + h, streams, w, w_w, WIDE)
        mbarrier.wait(stays, 0)
        t, t_w, r, r_w = tail_round(
            k_t, k_tw, v_t, v_tw, x, x_w, y, y_w, x_t, x_tw, y_t, y_tw, ls, dl, ls_t, dl_t, L, scale, BLOCKS, True, WIDE
        )
        tail_store(grads + H * D, t * factor, t_w * factor, START, L, 3 * H * D, D)
        tail_store(grads + 2 * H * D, r, r_w, START, L, 3 * H * D, D)
    a, a_w = _zeros(WIDE)
    c, c_w = _zeros(WIDE)
    mbarrier.wait(stays, 0)
    for i in range(BLOCKS):
        mbarrier.wait(streams, (i + ROUNDS - BLOCKS) & 1)
        k, k_w = to_registers(u, u_w, LEFT, WIDE)
        v, v_w = to_registers(w, w_w, LEFT, WIDE)
        if i > 0:
            store_rows(grad, grad_w, b, (i - 1) * 64, H + h, a, a_w, u, u_w, WIDE)
            store_rows(grad, grad_w, b, (i - 1) * 64, 2 * H + h, c, c_w, w, w_w, WIDE)
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
        load_rows(box, box_w, b, (i + 1) * 64, H + h, streams, u, u_w, WIDE, more)
        load_rows(box, box_w, b, (i + 1) * 64, 2 * H + h, streams, w, w_w, WIDE, more)
        for j in range(FIRST, BLOCKS):
            f, f_w, d, d_w = _step(
                k, k_w, v, v_w, x.index(j), x_w.index(j), y.index(j), y_w.index(j), ls.index(j), dl.index(j), 0, L, scale, f, f_w, d, d_w,
                64, False, True, False, WIDE,
            )  # fmt: skip
        a, a_w = _settle(f, f_w, factor, WIDE)
        c, c_w = _settle(d, d_w, 1.0, WIDE)
    store_rows(grad, grad_w, b, (BLOCKS - 1) * 64, H + h, a, a_w, u, u_w, WIDE)
    store_rows(grad, grad_w, b, (BLOCKS - 1) * 64, 2 * H + h, c, c_w, w, w_w, WIDE)
    tma.store_wait(0)
