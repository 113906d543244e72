"""What the Hopper kernels share: wgmma's registers, barriers, and the launch of a kernel before the last has ended.

Programmatic dependent launch: a kernel begins while the one before it ends, and waits before it needs its results. It
is launched with `launch_pdl`. Before it waits it may read what no running kernel writes: weights for which `once.met`
holds. A kernel lets the next one begin after it has waited itself, if it has to: so at most two are running, and what
the first of three wrote is there for the last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the name in Triton 3.6


@gluon.constexpr_function
def mma(N, K=16):
    """Return the layout of N columns of 64 rows in registers, as wgmma with K per instruction leaves them."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, K])


@gluon.jit
def settled(xs, behind: gl.constexpr = 0):
    """Return these products in flight, a tuple, once at most `behind` younger ones are."""
    done = warpgroup_mma_wait(behind, deps=xs)
    if len(xs) == 1:
        done = (done,)
    return done


@gluon.jit
def barriers(N: gl.constexpr):
    """Return N new barriers, each passed when one has arrived."""
    made = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(made.index(i), count=1)
    return made


@gluon.jit
def wait_for_others():
    """Wait until the kernel before this one has ended, and what it wrote can be read."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_begin():
    """Let the next kernel begin, if it was launched early, once all programs of this one have come here."""
    go: gl.constexpr = "griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(go, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
