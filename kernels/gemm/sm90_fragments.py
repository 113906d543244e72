"""Fragments on sm_90: what a thread does with its part of an accumulator, [64 features, tokens], in registers: GELU's
gate, conversions, halves.
"""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from uvit_fast.kernels.gemm.contract import G0, G1, G2
from uvit_fast.kernels.runtime.hopper import mma


def _immediate(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


# max(G1 + G2 w, 0) for nothing: the instruction clamps to [0, 1], and G1 is below 1
CLAMPED: gl.constexpr = gl.constexpr(f"fma.rn.sat.f32 $0, $1, {_immediate(G2.value)}, {_immediate(G1.value)};")


@gluon.jit
def tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gate(h):
    """Return tanh(v) with GELU's v, and w (see `contract`)."""
    w = h * h
    clamped = gl.inline_asm_elementwise(CLAMPED, "=f,f", [w], dtype=gl.float32, is_pure=True, pack=1)
    return tanh(h * (w * clamped + G0)), w


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """Return x as `dtype` holds it, in fp32. Bfloat16 goes in pairs: one at a time shares a slow unit with tanh."""
    if dtype == gl.bfloat16:
        pair: gl.constexpr = "{.reg .b32 p; cvt.rn.bf16x2.f32 p, $3, $2; shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000;}"
        y = gl.inline_asm_elementwise(pair, "=f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        y = x.to(dtype).to(gl.float32)
    return y


@gluon.jit
def widened(x):
    """Return x in fp32. A pair of bfloat16 values takes two instructions; one at a time it takes three."""
    if x.dtype == gl.bfloat16:
        pair: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        y = gl.inline_asm_elementwise(pair, "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        y = x.to(gl.float32)
    return y


@gluon.jit
def pairs(x):
    """Return [64, tokens] as [32, tokens] of int16: e4m3 of features i (low) and i + 8 of each 16.

    They are in one thread, and as 16-bit values are turned by the store as those of a 16-bit result are.
    """
    tokens: gl.constexpr = x.shape[1]
    pair: gl.constexpr = "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;"
    a, b = x.reshape([4, 2, 8, tokens]).permute([0, 2, 3, 1]).split()  # [4, 8, tokens] each
    y = gl.inline_asm_elementwise(pair, "=h,f,f", [a, b], dtype=gl.int16, is_pure=True, pack=1)
    return y.reshape([32, tokens])


@gluon.jit
def halves(x):
    """Return the left and the right half of x (64, N); no data moves between threads."""
    HALF: gl.constexpr = x.shape[1] // 2
    a, b = x.reshape([64, 2, HALF]).permute([0, 2, 1]).split()
    return gl.convert_layout(a, mma(HALF), assert_trivial=True), gl.convert_layout(b, mma(HALF), assert_trivial=True)


@gluon.jit
def parts(x, PART: gl.constexpr):
    """Return x (64, N) as a tuple of (64, PART), N being PART times a power of two."""
    if x.shape[1] > PART:
        a, b = halves(x)
        found = parts(a, PART) + parts(b, PART)
    else:
        found = (gl.convert_layout(x, mma(PART), assert_trivial=True),)  # of whatever K per instruction
    return found
