"""Attention of short sequences in plain Triton: for sm_80, head dims that the Hopper kernels do not support, and the
interpreter.

Legend: B batch, L tokens, H heads, D head dim. Rows of a head are a tuple of one or two pieces, D0 and D1 columns (D1
is 0 for a single piece): 72 is 64 + 16 with eight masked, so that no product is padded to the next power of two.
Scores are held in base 2: p = exp2(s * scale * log2(e) - lse).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.launch import cdiv

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_piece(pointer, rows, L, stride, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Return columns FIRST ... FIRST + WIDTH of some rows of one head; zero past row L and past column D."""
    columns = FIRST + tl.arange(0, WIDTH)  # (WIDTH,)
    inside = (rows < L)[:, None]
    if FIRST + WIDTH > D:
        inside = inside & (columns < D)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _load(pointer, rows, L, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Load rows of one head, in pieces."""
    x = (_load_piece(pointer, rows, L, stride, D, 0, D0),)
    if D1 > 0:
        x = (x[0], _load_piece(pointer, rows, L, stride, D, D0, D1))
    return x


@triton.jit
def _store(pointer, x, rows, L, stride, D: tl.constexpr):
    """Store rows of one head, in pieces; anything past row L or column D is dropped."""
    for i in tl.static_range(len(x)):
        columns = i * x[0].shape[1] + tl.arange(0, x[i].shape[1])
        inside = (rows < L)[:, None] & (columns < D)[None, :]
        at = pointer + rows[:, None] * stride + columns[None, :]
        tl.store(at, x[i].to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Return accumulators for rows, at zero, in pieces."""
    x = (tl.zeros([ROWS, D0], tl.float32),)
    if D1 > 0:
        x = (x[0], tl.zeros([ROWS, D1], tl.float32))
    return x


@triton.jit
def _times(x, factor):
    """Return x * factor: a number, or one per row (rows, 1)."""
    return [piece * factor for piece in x]


@triton.jit
def _row_sums(x, y):
    """Return the sum over d of x * y in fp32: (rows,)."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit
def _rows_by_rows(x, y):
    """Return x y^T: x (M, D), y (N, D) in pieces -> (M, N) fp32."""
    s = tl.zeros([x[0].shape[0], y[0].shape[0]], tl.float32)
    for i in tl.static_range(len(x)):
        s = tl.dot(x[i], tl.trans(y[i]), s, input_precision="ieee")
    return s


@triton.jit
def _accumulate(p, y, a):
    """Return a + p y: p (M, N) scores in y's dtype, y (N, D), a (M, D) fp32, both in pieces."""
    b = ()
    for i in tl.static_range(len(y)):
        b = b + (tl.dot(p, y[i], a[i], input_precision="ieee"),)
    return b


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
    stride = 3 * H * D
    q_at = qkv + (head // H).to(tl.int64) * L * stride + (head % H) * D
    k_at = q_at + H * D
    v_at = k_at + H * D

    q = _load(q_at, rows, L, stride, D, D0, D1)  # (BM, D)
    o = _zeros(BM, D0, D1)  # (BM, D)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in tl.range(0, L, BN):
        keys = start + tl.arange(0, BN)
        s = _rows_by_rows(q, _load(k_at, keys, L, stride, D, D0, D1))  # (BM, BN)
        s = tl.where((keys < L)[None, :], s * scale, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))  # finite: every block holds a valid key
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(m - new)
        total = total * shrink + tl.sum(p, 1)
        m = new
        v = _load(v_at, keys, L, stride, D, D0, D1)
        o = _accumulate(p.to(v[0].dtype), v, _times(o, shrink[:, None]))

    out_at = out + (head // H).to(tl.int64) * L * H * D + (head % H) * D
    _store(out_at, [piece / total[:, None] for piece in o], rows, L, H * D, D)
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
    stride = 3 * H * D
    packed = (head // H).to(tl.int64) * L * stride + (head % H) * D
    single = (head // H).to(tl.int64) * L * H * D + (head % H) * D
    k_at = qkv + packed + H * D
    v_at = k_at + H * D

    q = _load(qkv + packed, rows, L, stride, D, D0, D1)  # (BM, D)
    do = _load(dout + single, rows, L, H * D, D, D0, D1)
    dl = _row_sums(do, _load(out + single, rows, L, H * D, D, D0, D1))  # (BM,)
    dq = _zeros(BM, D0, D1)
    line = head.to(tl.int64) * L + rows
    tl.store(delta + line, dl, mask=rows < L)
    ls = tl.load(lse + line, mask=rows < L, other=float("inf"))
    for start in tl.range(0, L, BN):
        keys = start + tl.arange(0, BN)
        k = _load(k_at, keys, L, stride, D, D0, D1)  # (BN, D)
        v = _load(v_at, keys, L, stride, D, D0, D1)
        s = _rows_by_rows(q, k)  # (BM, BN)
        dp = _rows_by_rows(do, v)
        # a padded key scores 0, and exp2(0 - lse) is infinite when every real score is very negative
        p = tl.where((keys < L)[None, :], tl.exp2(s * scale - ls[:, None]), 0.0)
        ds = (p * (dp - dl[:, None])).to(k[0].dtype)
        dq = _accumulate(ds, k, dq)
    _store(dqkv + packed, _times(dq, scale / LOG2E), rows, L, stride, D)


@triton.jit
def attention_dkv_kernel(
    qkv,  # (B, L, 3, H, D)
    dout,  # (B, L, H, D)
    lse,  # (B, H, L) fp32, base 2
    delta,  # (B, H, L) fp32
    dqkv,  # (B, L, 3, H, D), its k and v parts written
    L,
    H,
    scale,  # D**-0.5 * log2(e)
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
    q_at = qkv + packed
    do_at = dout + (head // H).to(tl.int64) * L * H * D + (head % H) * D

    k = _load(q_at + H * D, keys, L, stride, D, D0, D1)  # (BN, D)
    v = _load(q_at + 2 * H * D, keys, L, stride, D, D0, D1)
    dk = _zeros(BN, D0, D1)
    dv = _zeros(BN, D0, D1)
    for start in tl.range(0, L, BM):
        rows = start + tl.arange(0, BM)
        line = head.to(tl.int64) * L + rows
        ls = tl.load(lse + line, mask=rows < L, other=float("inf"))  # infinite: a padded query weighs nothing
        dl = tl.load(delta + line, mask=rows < L, other=0.0)
        q = _load(q_at, rows, L, stride, D, D0, D1)  # (BM, D)
        do = _load(do_at, rows, L, H * D, D, D0, D1)
        s = _rows_by_rows(k, q)  # (BN, BM)
        dp = _rows_by_rows(v, do)
        p = tl.exp2(s * scale - ls[None, :])
        ds = (p * (dp - dl[None, :])).to(q[0].dtype)
        dv = _accumulate(p.to(q[0].dtype), do, dv)
        dk = _accumulate(ds, q, dk)
    _store(dqkv + packed + H * D, _times(dk, scale / LOG2E), keys, L, stride, D)
    _store(dqkv + packed + 2 * H * D, dv, keys, L, stride, D)


def pieces(D: int) -> tuple[int, int]:
    """Return the two powers of two that cover a head dim, at least 16 each; the second is 0 if one suffices."""
    if D <= 64:
        return max(16, triton.next_power_of_2(D)), 0
    return (64, 16) if D <= 80 else (128, 0)


def constants(D: int, streamed: str | None = None) -> dict[str, int]:
    """Return the compile-time arguments and launch options of a kernel for a head dim.

    Args:
        streamed: the side that a backward kernel streams, BM (queries) or BN (keys): a shorter one leaves its registers
            to the accumulators, which otherwise spill.
    """
    D0, D1 = pieces(D)
    c = {"D": D, "D0": D0, "D1": D1, "BM": 64, "BN": 64, "num_warps": 4 if D <= 80 else 8, "num_stages": 2}
    return c | {streamed: 32, "num_stages": 3} if streamed else c


def forward_launch(qkv: Tensor, out: Tensor, lse: Tensor) -> tuple:
    """Return the kernel, its arguments and its options."""
    _, L, _, H, D = qkv.shape
    return attention_forward_kernel, (qkv, out, lse, L, H, D**-0.5 * LOG2E.value), constants(D)


def backward_launches(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, delta: Tensor, dqkv: Tensor) -> list[tuple]:
    """Return the kernels in execution order: (kernel, arguments, options)."""
    _, L, _, H, D = qkv.shape
    scalars = (L, H, D**-0.5 * LOG2E.value)
    return [
        (attention_dq_kernel, (qkv, out, dout, lse, delta, dqkv, *scalars), constants(D, "BN")),
        (attention_dkv_kernel, (qkv, dout, lse, delta, dqkv, *scalars), constants(D, "BM")),
    ]


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (B, L, H*D) and lse (B, H, L), fp32 in base 2, for qkv (B, L, 3, H, D), contiguous."""
    B, L, _, H, D = qkv.shape
    out, lse = qkv.new_empty(B, L, H * D), qkv.new_empty(B, H, L, dtype=torch.float32)
    kernel, arguments, options = forward_launch(qkv, out, lse)
    launch.run(qkv.device, kernel, (B * H * cdiv(L, options["BM"]),), arguments, options)
    return out, lse


def backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """Return the gradient of qkv, packed like qkv; all arguments are contiguous."""
    B, L, _, H, _ = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    for kernel, arguments, options in backward_launches(qkv, out, lse, dout, delta, dqkv):
        launch.run(qkv.device, kernel, (B * H * cdiv(L, 64),), arguments, options)
    return dqkv
