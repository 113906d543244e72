"""The stages of shared memory between a producer, which fills them by TMA, and two consumers, which multiply them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from uvit_fast.kernels.runtime.aggregate import aggregate


@aggregate
class Ring:
    """Stages, each with an operand of 64 rows for each consumer, and one that both read."""

    a: gl.shared_memory_descriptor  # (2 STAGES, 64, K of a stage), or with A_TURNED (2 STAGES, K, 64)
    b: gl.shared_memory_descriptor  # (STAGES, K, columns), or with B_TURNED (STAGES, columns, K); APART 2 STAGES
    tail: gl.shared_memory_descriptor | gl.constexpr  # (STAGES, columns, K): more columns; None where there are none
    full: gl.shared_memory_descriptor  # (STAGES) barriers: the requested data is there
    empty: gl.shared_memory_descriptor  # (STAGES) barriers: both consumers have read it
    STAGES: gl.constexpr
    A_TURNED: gl.constexpr
    B_TURNED: gl.constexpr
    APART: gl.constexpr  # whether each consumer has a b of its own

    @gluon.jit
    def claim(self, step, BYTES: gl.constexpr):
        """Return the stage of this step and its barrier, once both consumers have left it; BYTES will arrive."""
        s = step % self.STAGES
        mbarrier.wait(self.empty.index(s), ((step // self.STAGES) & 1) ^ 1)
        bar = self.full.index(s)
        mbarrier.expect(bar, BYTES)
        return s, bar

    @gluon.jit
    def operands(self, step, WHO: gl.constexpr):
        """Return the operands (64, K) and (K, columns) of a consumer's step, once they are there."""
        s = step % self.STAGES
        mbarrier.wait(self.full.index(s), (step // self.STAGES) & 1)
        a = self.a.index(s * 2 + WHO)
        if self.A_TURNED:
            a = a.permute([1, 0])
        b = self.b.index(s * 2 + WHO if self.APART else s)
        if self.B_TURNED:
            b = b.permute([1, 0])
        return a, b

    @gluon.jit
    def operand_tail(self, step):
        """Return the columns (K, columns) of the tail in a step whose `operands` are there."""
        return self.tail.index(step % self.STAGES).permute([1, 0])

    @gluon.jit
    def free(self, step):
        """Release the stage of this step to the producer."""
        mbarrier.arrive(self.empty.index(step % self.STAGES), count=1)


@gluon.jit
def ring(
    a, b, STAGES: gl.constexpr, A_TURNED: gl.constexpr, B_TURNED: gl.constexpr, tail=None, APART: gl.constexpr = False
):
    """Return a new ring for the boxes of these descriptors: an a for each consumer, and a b, and a tail, for both.

    APART: each consumer has a b of its own, too.
    """
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    more = None
    if tail is not None:
        more = gl.allocate_shared_memory(tail.dtype, [STAGES] + tail.block_type.shape, tail.layout)
    made = Ring(
        gl.allocate_shared_memory(a.dtype, [2 * STAGES] + a.block_type.shape, a.layout),
        gl.allocate_shared_memory(b.dtype, [2 * STAGES if APART else STAGES] + b.block_type.shape, b.layout),
        more,
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout),
        STAGES,
        A_TURNED,
        B_TURNED,
        APART,
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(made.full.index(i), count=1)
        mbarrier.init(made.empty.index(i), count=2)
    return made
