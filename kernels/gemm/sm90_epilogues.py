"""What the Hopper GEMM's epilogue is made of: parts of an accumulator, GELU, and ways between a part and memory."""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from uvit_fast.kernels.gemm.sm80 import G0 as _G0
from uvit_fast.kernels.gemm.sm80 import G1 as _G1
from uvit_fast.kernels.gemm.sm80 import G2 as _G2

G0: gl.constexpr = gl.constexpr(_G0.value)
G1: gl.constexpr = gl.constexpr(_G1.value)
G2: gl.constexpr = gl.constexpr(_G2.value)


def _immediate(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


# max(G1 + G2 w, 0) for nothing: the instruction clamps to [0, 1], and G1 is below 1
CLAMPED: gl.constexpr = gl.constexpr(f"fma.rn.sat.f32 $0, $1, {_immediate(_G2.value)}, {_immediate(_G1.value)};")


@gluon.jit
def tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gate(h):
    """tanh(v) with GELU's v, and w (see gemm_ampere)."""
    w = h * h
    clamped = gl.inline_asm_elementwise(CLAMPED, "=f,f", [w], dtype=gl.float32, is_pure=True, pack=1)
    return tanh(h * (w * clamped + G0)), w


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x as `dtype` holds it, in fp32. Two bfloat16 values at a time: one at a time they share a slow unit with tanh."""
    if dtype == gl.bfloat16:
        pair: gl.constexpr = "{.reg .b32 p; cvt.rn.bf16x2.f32 p, $3, $2; shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000;}"
        y = gl.inline_asm_elementwise(pair, "=f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        y = x.to(dtype).to(gl.float32)
    return y


@gluon.jit
def widened(x):
    """x in fp32. A pair of bfloat16 values takes two instructions; one at a time it takes three."""
    if x.dtype == gl.bfloat16:
        pair: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        y = gl.inline_asm_elementwise(pair, "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        y = x.to(gl.float32)
    return y


@gluon.jit
def halves(x, rows: gl.constexpr, cols: gl.constexpr):
    """[rows, cols] -> its left and right half; no data moves between threads."""
    a, b = x.reshape([rows, 2, cols // 2]).permute([0, 2, 1]).split()
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols // 2, 16])
    return gl.convert_layout(a, lay, assert_trivial=True), gl.convert_layout(b, lay, assert_trivial=True)


@gluon.jit
def parts(acc, rows: gl.constexpr, tokens: gl.constexpr, part: gl.constexpr):
    """[rows, tokens] -> a tuple of [rows, part]; tokens 256 and part 64 or 32, or 64 and 32."""
    if tokens == 64:
        found = halves(acc, rows, 64)
    else:
        a, b = halves(acc, rows, 256)
        c, d = halves(a, rows, 128)
        e, f = halves(b, rows, 128)
        if part == 64:
            found = (c, d, e, f)
        else:
            c0, c1 = halves(c, rows, 64)
            d0, d1 = halves(d, rows, 64)
            e0, e1 = halves(e, rows, 64)
            f0, f1 = halves(f, rows, 64)
            found = (c0, c1, d0, d1, e0, e1, f0, f1)
    return found


@gluon.jit
def read_rstd(stats, token, stride, SN: gl.constexpr):
    """rstd of SN tokens, in the layout of a part's columns; there is memory, if no sense, for those past the last."""
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SN, 16])
    return gl.load(stats + stride + token + gl.arange(0, SN, layout=gl.SliceLayout(0, lay)))


@gluon.jit
def touch(rstd, TOKENS: gl.constexpr):
    """A tile's rstd on its way into L1, where `read_rstd` will look for it after the main loop."""
    lay: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    hint: gl.constexpr = "prefetch.global.L1 [$1]; mov.b32 $0, 0;"
    line = (rstd + gl.arange(0, TOKENS, layout=lay)).to(gl.int64)
    gl.inline_asm_elementwise(hint, "=r,l", [line], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fetch(side_desc, token, feature, bar, buf):
    mbarrier.expect(bar, side_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(side_desc, [token, feature], bar, buf)


@gluon.jit
def send(x, out_desc, token, feature, buf):
    """A part [ROWS, SN] through its staging buffer [SN, ROWS] to out[token:, feature:]."""
    buf.permute([1, 0]).store(x.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [token, feature], buf)


@gluon.jit
def write_moments(buf, moments, chunk, token, inside, M, ROWS: gl.constexpr, SN: gl.constexpr):
    """Sums of a part's tokens over its ROWS features, as rounded, and of their squared distances from the mean of these ROWS.

    Read back from the staging buffer, where a thread finds many features of one token: in the accumulator they are everyone's.
    """
    lay: gl.constexpr = gl.BlockedLayout([1, SN * ROWS // 128], [SN // 4, 128 // SN], [4, 1], [1, 0])
    x = widened(buf.load(lay))
    total = gl.sum(x, axis=1)
    x = x - gl.expand_dims(total * (1.0 / ROWS), 1)
    at = token + gl.arange(0, SN, layout=gl.SliceLayout(1, lay))
    first = moments + chunk * 2 * M + at
    gl.store(first, total, mask=(at < M) & inside)
    gl.store(first + M, gl.sum(x * x, axis=1), mask=(at < M) & inside)


@gluon.jit
def send_two(x, x_desc, x_buf, y, y_desc, y_buf, token, feature):
    """Two parts at once: one fence and one barrier for both."""
    x_buf.permute([1, 0]).store(x.to(x_desc.dtype))
    y_buf.permute([1, 0]).store(y.to(y_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(x_desc, [token, feature], x_buf)
    tma.async_copy_shared_to_global(y_desc, [token, feature], y_buf)
