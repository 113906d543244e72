"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits where it first needs it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait_for_others():
    """Wait until the kernel before this one has ended; then let the next one begin, which will wait too."""
    wait: gl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(wait, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
