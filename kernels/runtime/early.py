"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits before it needs its results.

It is launched with `launch_pdl`. Before it waits it may read what no running kernel writes: weights for which
`once.met` holds. A kernel lets the next one begin after it has waited itself, if it has to: so at most two are running,
and what the first of three wrote is there for the last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait_for_others():
    """Wait until the kernel before this one has ended, and what it wrote can be read."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_begin():
    """Let the next kernel begin, if it was launched early, once all programs of this one have come here."""
    go: gl.constexpr = "griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(go, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
