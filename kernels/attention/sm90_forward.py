"""Attention of short sequences for sm_90 in Gluon: one CTA a head, the whole head in shared memory, two CTAs an SM.

Legend: B batch, L tokens, H heads, D head dim (64, or 72 and 80 as 64 + 16 columns, `WIDE`). The tokens of a head are
`BLOCKS` blocks of 64 rows and, where at most 16 are left over (258 = 4 * 64 + 2), a `TAIL` of 16 rows; else the last block is
`RAGGED`. TMA reads q, k and v straight from packed qkv and fills what lies past row L or column D with zeros.

The backward is two kernels without atomics. Phase A: k and v stay, query blocks stream past, each leaves its dq and delta.
Phase B: q and dout stay, key blocks stream past, each leaves dk and dv. A streamed block moves to registers at once, so that
its buffers can take the block before it out and the block after it in while the products run. The rows of a tail go before
the blocks, on 16-row products; as resident rows they are one more, narrow product of every block.
Scores are held in base 2: p = exp2(s * scale * log2(e) - lse).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from uvit_fast.kernels.attention.sm90_backward import attention_dkv_kernel, attention_dq_kernel
from uvit_fast.kernels.attention.sm90_tiles import (
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
    store_rows,
    tail_attend,
    tail_store,
    to_registers,
)
from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

LOG2E = 1.4426950408889634


@gluon.jit
def attention_forward_kernel(
    box,  # qkv as (B, L, 3H, D) in boxes of 64 rows and 64 columns
    box_w,  # the same, 16 columns
    tail,  # 16 rows, 64 columns
    tail_w,  # 16 rows, 16 columns
    out,  # (B, L, H, D) in boxes of 64 rows, 64 columns
    out_w,  # the same, 16 columns
    whole,  # (B, L, H, D), what `out` is a view of
    lse,  # (B, H, L) fp32, base 2
    L,
    scale,  # D**-0.5 * log2(e)
    D: gl.constexpr,
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
    START: gl.constexpr = BLOCKS * 64 if TAIL else 0  # the tail goes first
    BEFORE: gl.constexpr = 1 if TAIL else 0  # what has been through the buffers of q before block 0
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    row: gl.constexpr = gl.SliceLayout(1, mma)
    row_64: gl.constexpr = gl.SliceLayout(1, MMA_64)
    row_16: gl.constexpr = gl.SliceLayout(1, MMA_16)
    row_small: gl.constexpr = gl.SliceLayout(1, SMALL)

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
    load_rows(box, box_w, b, START, h, bars.index(0), q.index(0), q_w.index(0), WIDE)
    mbarrier.expect(bars.index(2), HEAD)
    load_head(box, box_w, tail, tail_w, b, H + h, bars.index(2), k, k_w, k_t, k_tw, BLOCKS, TAIL, WIDE)
    mbarrier.expect(bars.index(3), HEAD)
    load_head(box, box_w, tail, tail_w, b, 2 * H + h, bars.index(3), v, v_w, v_t, v_tw, BLOCKS, TAIL, WIDE)
    if BLOCKS + BEFORE > 1:
        mbarrier.expect(bars.index(1), 64 * ROW)
        load_rows(box, box_w, b, 64 * (1 - BEFORE), h, bars.index(1), q.index(1), q_w.index(1), WIDE)

    ks = k._reinterpret(dtype, [NK, BN, 64], SWIZZLE_128)
    vs = v._reinterpret(dtype, [NK, BN, 64], SWIZZLE_128)
    ks_w, vs_w = ks, vs
    if WIDE:
        ks_w = k_w._reinterpret(dtype, [NK, BN, 16], SWIZZLE_32)
        vs_w = v_w._reinterpret(dtype, [NK, BN, 16], SWIZZLE_32)
    if TAIL:
        mbarrier.wait(bars.index(0), 0)
        x, x_w = to_registers(
            q._reinterpret(dtype, [8, 16, 64], SWIZZLE_128).index(0),
            q_w._reinterpret(dtype, [8, 16, 16], SWIZZLE_32).index(0) if WIDE else q,
            LEFT_SMALL,
            WIDE,
        )
        barrier()
        m_t = gl.full([16], float("-inf"), gl.float32, row_small)
        total_t = gl.zeros([16], gl.float32, row_small)
        o_t = gl.zeros([16, 64], gl.float32, SMALL)
        o_tw = gl.zeros([16, 16], gl.float32, SMALL)
        via = q.index(0)._reinterpret(dtype, [64 * 64 // (16 * BN), 16, BN], SWIZZLE_128).index(0)
        via_t = q.index(0)._reinterpret(dtype, [16, 16, 16], SWIZZLE_32).index(0)
        mbarrier.wait(bars.index(2), 0)
        mbarrier.wait(bars.index(3), 0)
        for n in gl.static_range(NK):
            m_t, total_t, o_t, o_tw = tail_attend(
                x, x_w, ks.index(n), ks_w.index(n), vs.index(n), vs_w.index(n), via, 0, L, scale, m_t, total_t, o_t, o_tw,
                BN, False, WIDE,
            )  # fmt: skip
        m_t, total_t, o_t, o_tw = tail_attend(
            x, x_w, k_t, k_tw, v_t, v_tw, via_t, START, L, scale, m_t, total_t, o_t, o_tw, 16, True, WIDE
        )
        rows_t = START + gl.arange(0, 16, layout=row_small)
        gl.store(lse + head * L + rows_t, m_t + gl.log2(total_t), mask=rows_t < L)
        total_t = gl.expand_dims(1.0 / total_t, 1)
        tail_store(whole + b.to(gl.int64) * L * (H * D) + h * D, o_t * total_t, o_tw * total_t, START, L, H * D, D)
        fence_async_shared()  # TMA is next to write where the scores were
    keys_t = START + gl.arange(0, 16, layout=gl.SliceLayout(0, MMA_16))
    for i in range(BLOCKS):
        u = (i + BEFORE) & 1
        mbarrier.wait(bars.index(u), ((i + BEFORE) // 2) & 1)
        mbarrier.wait(bars.index(2), 0)
        m = gl.full([64], float("-inf"), gl.float32, row)
        total = gl.zeros([64], gl.float32, row)
        o = gl.zeros([64, 64], gl.float32, MMA_64)
        o_w = gl.zeros([64, 16], gl.float32, MMA_16)
        for j in gl.static_range(NK):
            s = rows_by_rows(q.index(u), q_w.index(u), ks.index(j), ks_w.index(j), BN, WIDE)
            if TAIL and j == NK - 1:
                t = rows_by_rows(q.index(u), q_w.index(u), k_t, k_tw, 16, WIDE)
                s, t = warpgroup_mma_wait(0, deps=(s, t))
                t = gl.where(gl.expand_dims(keys_t < L, 0), t, float("-inf"))
            else:
                s = warpgroup_mma_wait(0, deps=(s,))
            if j == 0 and i + BEFORE > 0:
                # the other buffer has held the output of the block before this one: by now that has left
                tma.store_wait(0)
                if i + 1 < BLOCKS:
                    mbarrier.expect(bars.index(1 - u), 64 * ROW)
                    load_rows(box, box_w, b, (i + 1) * 64, h, bars.index(1 - u), q.index(1 - u), q_w.index(1 - u), WIDE)
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
            p = left(p, dtype)
            if j == 0:
                mbarrier.wait(bars.index(3), 0)
            o, o_w = accumulate(p, vs.index(j), vs_w.index(j), o, o_w, WIDE)
            if TAIL and j == NK - 1:
                t = gl.exp2(t * scale - gl.expand_dims(gl.convert_layout(m, row_16), 1))
                total += gl.convert_layout(gl.sum(t, 1), row)
                o, o_w = accumulate(left(t, dtype), v_t, v_tw, o, o_w, WIDE)
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
        store_rows(out, out_w, b, i * 64, h, o, o_w, q.index(u), q_w.index(u), WIDE)
    tma.store_wait(0)


def shape_constants(L: int, H: int, D: int) -> dict[str, int | bool]:
    """How L tokens are cut: whole blocks of 64, then a tail of at most 16, or a ragged last block."""
    tail = L > 64 and 0 < L % 64 <= 16
    return {
        "H": H,
        "BLOCKS": L // 64 if tail else cdiv(L, 64),
        "TAIL": tail,
        "RAGGED": not tail and L % 64 > 0,
        "WIDE": D > 64,
    }


def _boxes(t: Tensor, groups: int, D: int, rows: tuple[int, ...]) -> list[TensorDescriptor | None]:
    """TMA views of t (B, L, groups * D) for boxes of so many rows, 64 columns and (where D needs them) 16."""
    t = t.view(t.shape[0], t.shape[1], groups, D)
    found = []
    for n in rows:
        found += [descriptor(t, 1, n, 1, 64), descriptor(t, 1, n, 1, 16) if D > 64 else None]
    return found


def _all_boxes(t: Tensor, groups: int, D: int, tail: bool) -> list[TensorDescriptor | None]:
    return _boxes(t, groups, D, (64, 16)) if tail else [*_boxes(t, groups, D, (64,)), None, None]


def forward_launch(qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[tuple, dict]:
    """Arguments and options of the forward kernel."""
    _, L, _, H, D = qkv.shape
    c = shape_constants(L, H, D)
    c["BN"] = 256 if c["BLOCKS"] % 4 == 0 else 128 if c["BLOCKS"] % 2 == 0 else 64
    boxes = _all_boxes(qkv, 3 * H, D, c["TAIL"]) + _boxes(out, H, D, (64,))
    return (*boxes, out, lse, L, D**-0.5 * LOG2E, D), {**c, "num_warps": 4}


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
    """The kernels in the order in which they run: (kernel, arguments, options)."""
    first, second, options = backward_launches(qkv, out, lse, dout, delta, dqkv)
    return [
        (attention_forward_kernel, *forward_launch(qkv, out, lse)),
        (attention_dq_kernel, first, options),
        (attention_dkv_kernel, second, options),
    ]


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """qkv (B, L, 3, H, D), contiguous -> out (B, L, H*D), lse (B, H, L) fp32 in base 2."""
    B, L, _, H, D = qkv.shape
    out = qkv.new_empty(B, L, H * D)
    lse = qkv.new_empty(B, H, L, dtype=torch.float32)
    arguments, options = forward_launch(qkv, out, lse)
    launch.run(qkv.device, attention_forward_kernel, (B * H,), arguments, options)
    return out, lse


def backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """The gradient of qkv, packed as qkv is; every argument contiguous."""
    B, _, _, H, _ = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    first, second, options = backward_launches(qkv, out, lse, dout, delta, dqkv)
    launch.run(qkv.device, attention_dq_kernel, (B * H,), first, options)
    launch.run(qkv.device, attention_dkv_kernel, (B * H,), second, options)
    return dqkv
