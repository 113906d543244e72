"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits before it needs its results.

What it may do before it waits is to read what no kernel under way writes: weights. It lets the next one begin only when
it has waited itself, so that two kernels are under way at most, and what the first of three wrote is there for the last.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from uvit_fast.kernels.runtime import once

MOST = 4128  # tokens, up to which a kernel is short enough to gain; that is as far as it was measured


def may_be_early(tokens: int, weight: Tensor) -> bool:
    """Return whether a kernel that reads this weight before it waits may be launched early, and gains by it."""
    return tokens <= MOST and once.met(weight)


@gluon.jit
def wait_for_others():
    """Wait until the kernel before this one has ended, and what it wrote can be read."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_begin():
    """Let the next kernel begin, where it was launched early and once all programs of this one have come here."""
    go: gl.constexpr = "griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(go, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
