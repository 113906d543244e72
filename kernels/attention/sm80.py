"""Attention of short sequences in plain Triton: for sm_80, for head dims the Hopper kernels leave out, and for the interpreter.

Legend: B batch, L tokens, H heads, D head dim. A head dim that is no power of two is two pieces, D0 + D1 columns (72 is
64 + 16 with eight of them masked), so that no product is padded to the next power of two. Scores are held in base 2:
p = exp2(s * scale * log2(e) - lse).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.launch import cdiv

LOG2E = 1.4426950408889634


@triton.jit
def _load(pointer, rows, L, stride, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH of some rows of one head; zero past row L and past column D."""
    columns = FIRST + tl.arange(0, WIDTH)  # (WIDTH,)
    inside = (rows < L)[:, None]
    if FIRST + WIDTH > D:
        inside = inside & (columns < D)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, value, rows, L, stride, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows < L)[:, None] & (columns < D)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def attention_forward_kernel(
    qkv,  # (B, L, 3, H, D)
    out,  # (B, L, H, D)
    lse,  # (B, H, L) fp32, base 2
    L,
    H,
    scale,  # D**-0.5 * log2(e)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(L, BM)
    head = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)  # (BM,) queries
    q = qkv + (head // H).to(tl.int64) * L * 3 * H * D + (head % H) * D
    k = q + H * D
    v = k + H * D
    stride = 3 * H * D

    q0 = _load(q, rows, L, stride, D, 0, D0)  # (BM, D0)
    o0 = tl.zeros([BM, D0], tl.float32)
    if D1 > 0:
        q1 = _load(q, rows, L, stride, D, D0, D1)  # (BM, D1)
        o1 = tl.zeros([BM, D1], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in tl.range(0, L, BN):
        keys = start + tl.arange(0, BN)
        k0 = _load(k, keys, L, stride, D, 0, D0)  # (BN, D0)
        s = _dot(q0, tl.trans(k0), tl.zeros([BM, BN], tl.float32))  # (BM, BN)
        if D1 > 0:
            k1 = _load(k, keys, L, stride, D, D0, D1)
            s = _dot(q1, tl.trans(k1), s)
        s = tl.where((keys < L)[None, :], s * scale, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))  # finite: every block holds a valid key
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(m - new)
        total = total * shrink + tl.sum(p, 1)
        m = new
        v0 = _load(v, keys, L, stride, D, 0, D0)
        o0 = _dot(p.to(v0.dtype), v0, o0 * shrink[:, None])
        if D1 > 0:
            v1 = _load(v, keys, L, stride, D, D0, D1)
            o1 = _dot(p.to(v1.dtype), v1, o1 * shrink[:, None])

    o = out + (head // H).to(tl.int64) * L * H * D + (head % H) * D
    _store(o, o0 / total[:, None], rows, L, H * D, D, 0, D0)
    if D1 > 0:
        _store(o, o1 / total[:, None], rows, L, H * D, D, D0, D1)
    tl.store(lse + head.to(tl.int64) * L + rows, m + tl.log2(total), mask=rows < L)


@triton.jit
def attention_dq_kernel(
    qkv,  # (B, L, 3, H, D)
    out,  # (B, L, H, D)
    dout,  # (B, L, H, D)
    lse,  # (B, H, L) fp32, base 2
    delta,  # (B, H, L) fp32, written: sum over d of dout * out
    dqkv,  # (B, L, 3, H, D), its q part written
    L,
    H,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(L, BM)
    head = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)  # (BM,) queries
    stride = 3 * H * D
    packed = (head // H).to(tl.int64) * L * stride + (head % H) * D
    single = (head // H).to(tl.int64) * L * H * D + (head % H) * D
    k = qkv + packed + H * D
    v = k + H * D

    q0 = _load(qkv + packed, rows, L, stride, D, 0, D0)
    do0 = _load(dout + single, rows, L, H * D, D, 0, D0)
    o0 = _load(out + single, rows, L, H * D, D, 0, D0)
    dl = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)  # (BM,)
    dq0 = tl.zeros([BM, D0], tl.float32)
    if D1 > 0:
        q1 = _load(qkv + packed, rows, L, stride, D, D0, D1)
        do1 = _load(dout + single, rows, L, H * D, D, D0, D1)
        o1 = _load(out + single, rows, L, H * D, D, D0, D1)
        dl += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
        dq1 = tl.zeros([BM, D1], tl.float32)
    line = head.to(tl.int64) * L + rows
    tl.store(delta + line, dl, mask=rows < L)
    ls = tl.load(lse + line, mask=rows < L, other=float("inf"))
    for start in tl.range(0, L, BN):
        keys = start + tl.arange(0, BN)
        k0 = _load(k, keys, L, stride, D, 0, D0)
        v0 = _load(v, keys, L, stride, D, 0, D0)
        s = _dot(q0, tl.trans(k0), tl.zeros([BM, BN], tl.float32))
        dp = _dot(do0, tl.trans(v0), tl.zeros([BM, BN], tl.float32))
        if D1 > 0:
            k1 = _load(k, keys, L, stride, D, D0, D1)
            v1 = _load(v, keys, L, stride, D, D0, D1)
            s = _dot(q1, tl.trans(k1), s)
            dp = _dot(do1, tl.trans(v1), dp)
        # a padded key scores 0, and exp2(0 - lse) is infinite when every real score is very negative
        p = tl.where((keys < L)[None, :], tl.exp2(s * scale - ls[:, None]), 0.0)
        ds = (p * (dp - dl[:, None])).to(k0.dtype)
        dq0 = _dot(ds, k0, dq0)
        if D1 > 0:
            dq1 = _dot(ds, k1, dq1)

    scale = scale / 1.4426950408889634
    _store(dqkv + packed, dq0 * scale, rows, L, stride, D, 0, D0)
    if D1 > 0:
        _store(dqkv + packed, dq1 * scale, rows, L, stride, D, D0, D1)


@triton.jit
def attention_dkv_kernel(
    qkv,  # (B, L, 3, H, D)
    dout,  # (B, L, H, D)
    lse,  # (B, H, L) fp32, base 2
    delta,  # (B, H, L) fp32
    dqkv,  # (B, L, 3, H, D), its k and v parts written
    L,
    H,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(L, BN)
    head = tl.program_id(0) // blocks
    keys = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)  # (BN,) keys
    stride = 3 * H * D
    packed = (head // H).to(tl.int64) * L * stride + (head % H) * D
    do = dout + (head // H).to(tl.int64) * L * H * D + (head % H) * D
    q = qkv + packed

    k0 = _load(q + H * D, keys, L, stride, D, 0, D0)
    v0 = _load(q + 2 * H * D, keys, L, stride, D, 0, D0)
    dk0 = tl.zeros([BN, D0], tl.float32)
    dv0 = tl.zeros([BN, D0], tl.float32)
    if D1 > 0:
        k1 = _load(q + H * D, keys, L, stride, D, D0, D1)
        v1 = _load(q + 2 * H * D, keys, L, stride, D, D0, D1)
        dk1 = tl.zeros([BN, D1], tl.float32)
        dv1 = tl.zeros([BN, D1], tl.float32)
    for start in tl.range(0, L, BM):
        rows = start + tl.arange(0, BM)
        line = head.to(tl.int64) * L + rows
        ls = tl.load(lse + line, mask=rows < L, other=float("inf"))  # infinite: a padded query weighs nothing
        dl = tl.load(delta + line, mask=rows < L, other=0.0)
        q0 = _load(q, rows, L, stride, D, 0, D0)
        do0 = _load(do, rows, L, H * D, D, 0, D0)
        s = _dot(k0, tl.trans(q0), tl.zeros([BN, BM], tl.float32))  # (BN, BM)
        dp = _dot(v0, tl.trans(do0), tl.zeros([BN, BM], tl.float32))
        if D1 > 0:
            q1 = _load(q, rows, L, stride, D, D0, D1)
            do1 = _load(do, rows, L, H * D, D, D0, D1)
            s = _dot(k1, tl.trans(q1), s)
            dp = _dot(v1, tl.trans(do1), dp)
        p = tl.exp2(s * scale - ls[None, :])
        ds = (p * (dp - dl[None, :])).to(q0.dtype)
        p = p.to(q0.dtype)
        dv0 = _dot(p, do0, dv0)
        dk0 = _dot(ds, q0, dk0)
        if D1 > 0:
            dv1 = _dot(p, do1, dv1)
            dk1 = _dot(ds, q1, dk1)

    scale = scale / 1.4426950408889634
    _store(dqkv + packed + H * D, dk0 * scale, keys, L, stride, D, 0, D0)
    _store(dqkv + packed + 2 * H * D, dv0, keys, L, stride, D, 0, D0)
    if D1 > 0:
        _store(dqkv + packed + H * D, dk1 * scale, keys, L, stride, D, D0, D1)
        _store(dqkv + packed + 2 * H * D, dv1, keys, L, stride, D, D0, D1)


def pieces(D: int) -> tuple[int, int]:
    """The two powers of two that cover a head dim, at least 16 each; the second is 0 where one does."""
    if D <= 64:
        return max(16, triton.next_power_of_2(D)), 0
    return (64, 16) if D <= 80 else (128, 0)


def constants(D: int, streamed: str | None = None) -> dict[str, int]:
    """Compile-time arguments and launch options of a kernel for a head dim.

    Args:
        streamed: the side that a backward kernel streams, BM (queries) or BN (keys): a shorter one leaves its registers to
            the accumulators, which otherwise spill.
    """
    D0, D1 = pieces(D)
    c = {"D": D, "D0": D0, "D1": D1, "BM": 64, "BN": 64, "num_warps": 4 if D <= 80 else 8, "num_stages": 2}
    return c | {streamed: 32, "num_stages": 3} if streamed else c


def launches(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, delta: Tensor, dqkv: Tensor) -> list[tuple]:
    """The kernels in the order in which they run: (kernel, arguments, options)."""
    _, L, _, H, D = qkv.shape
    scalars = (L, H, D**-0.5 * LOG2E)
    return [
        (attention_forward_kernel, (qkv, out, lse, *scalars), constants(D)),
        (attention_dq_kernel, (qkv, out, dout, lse, delta, dqkv, *scalars), constants(D, "BN")),
        (attention_dkv_kernel, (qkv, dout, lse, delta, dqkv, *scalars), constants(D, "BM")),
    ]


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """qkv (B, L, 3, H, D), contiguous -> out (B, L, H*D), lse (B, H, L) fp32 in base 2."""
    B, L, _, H, D = qkv.shape
    out = qkv.new_empty(B, L, H * D)
    lse = qkv.new_empty(B, H, L, dtype=torch.float32)
    c = constants(D)
    grid = (B * H * cdiv(L, c["BM"]),)
    launch.run(qkv.device, attention_forward_kernel, grid, (qkv, out, lse, L, H, D**-0.5 * LOG2E), c)
    return out, lse


def backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """The gradient of qkv, packed as qkv is; every argument contiguous."""
    B, L, _, H, D = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    grid, scalars = (B * H * cdiv(L, 64),), (L, H, D**-0.5 * LOG2E)
    by_query, by_key = (qkv, out, dout, lse, delta, dqkv, *scalars), (qkv, dout, lse, delta, dqkv, *scalars)
    launch.run(qkv.device, attention_dq_kernel, grid, by_query, constants(D, "BN"))
    launch.run(qkv.device, attention_dkv_kernel, grid, by_key, constants(D, "BM"))
    return dqkv
