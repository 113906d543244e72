"""The parts of the Hopper attention kernels: rows of a head in global memory, shared memory, registers; their products.

Legend: B batch, L tokens, H heads, D head dim. The columns of a head are `main`, the first 64, and, for larger D (72,
80:
WIDE), `rest`, the next 16, zero past D. Its rows are blocks of 64 and, if `cut` says so, a tail.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_accumulator,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

LOG2E = 1.4426950408889634
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the name in Triton 3.6

SWIZZLE_128 = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # 64 columns
SWIZZLE_32 = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))  # 16 columns
MMA_64 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
MMA_16 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA_64.value, 2))
SMALL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]))  # 16 rows, a quarter of the columns a warp
LEFT_SMALL = gl.constexpr(gl.DotOperandLayout(0, SMALL.value, 2))
NARROW_64 = gl.constexpr(  # what a thread of MMA_64 holds of a row, side by side in `narrow` order
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
RIGHT_SMALL = gl.constexpr(gl.DotOperandLayout(1, SMALL.value, 2))


@aggregate
class Registers:
    """Rows of a head in registers: operands of 16 bits, or sums in fp32."""

    main: gl.tensor | warpgroup_mma_accumulator  # (rows, 64); an accumulator while its products are in flight
    rest: gl.tensor | warpgroup_mma_accumulator | gl.constexpr  # (rows, 16); None where D = 64

    @gluon.jit
    def scaled(self, factor):
        """Return self * factor, a number."""
        return Registers(self.main * factor, None if self.rest is None else self.rest * factor)

    @gluon.jit
    def scaled_rows(self, factor):
        """Return self * factor (rows,), one for each row, in any layout."""
        return Registers(
            self.main * down(factor, self.main), None if self.rest is None else self.rest * down(factor, self.rest)
        )

    @gluon.jit
    def settled(self):
        """Return self once all products in flight have arrived."""
        if self.rest is None:
            done = Registers(warpgroup_mma_wait(0, deps=(self.main,)), None)
        else:
            main, rest = warpgroup_mma_wait(0, deps=(self.main, self.rest))
            done = Registers(main, rest)
        return done


@aggregate
class Shared:
    """Rows of a head in shared memory."""

    main: gl.shared_memory_descriptor  # (rows, 64) or (blocks, rows, 64)
    rest: gl.shared_memory_descriptor | gl.constexpr  # (rows, 16) or (blocks, rows, 16); None where D = 64

    @gluon.jit
    def index(self, i):
        """Return a block (rows, D)."""
        return Shared(self.main.index(i), None if self.rest is None else self.rest.index(i))

    @gluon.jit
    def cut(self, ROWS: gl.constexpr):
        """Return the same rows as blocks of ROWS."""
        blocks: gl.constexpr = self.main.numel // (64 * ROWS)
        main = self.main._reinterpret(self.main.dtype, [blocks, ROWS, 64], SWIZZLE_128)
        rest = self.rest
        if self.rest is not None:
            rest = self.rest._reinterpret(self.main.dtype, [blocks, ROWS, 16], SWIZZLE_32)
        return Shared(main, rest)

    @gluon.jit
    def to_registers(self, layout: gl.constexpr):
        """Return a block as left operands."""
        return Registers(self.main.load(layout), None if self.rest is None else self.rest.load(layout))


@aggregate
class Head:
    """All rows of a head in shared memory."""

    blocks: Shared | gl.shared_memory_descriptor  # (BLOCKS, 64, D), or of a statistic (BLOCKS, 64)
    tail: Shared | gl.shared_memory_descriptor | gl.constexpr  # (16, D) or (16,); None where there is none

    @gluon.jit
    def load(self, source, bar):
        """Load all rows of `source`, Global, asynchronously."""
        BLOCKS: gl.constexpr = self.blocks.main.shape[0]
        ROWS: gl.constexpr = self.blocks.main.shape[1]
        for i in gl.static_range(BLOCKS):
            source.load(i * ROWS, self.blocks.index(i), bar)
        if self.tail is not None:
            source.tail.load(source.b, BLOCKS * ROWS, source.group, self.tail, bar)

    @gluon.jit
    def cut(self, ROWS: gl.constexpr):
        """Return the same rows, the blocks of ROWS."""
        return Head(self.blocks.cut(ROWS), self.tail)


@aggregate
class Boxes:
    """What TMA moves of a tensor (B, L, groups, D) at once: rows of one group, in one box or two."""

    main: tma.tensor_descriptor | gl.constexpr  # boxes (1, rows, 1, 64); None for those of a tail where there is none
    rest: tma.tensor_descriptor | gl.constexpr  # boxes (1, rows, 1, 16), from column 64 on; None where D = 64

    @gluon.jit
    def load(self, b, row, group, to, bar, wanted=True):
        """Load rows from `row` on into Shared, asynchronously; TMA fills with zeros past L or D."""
        buf = to.main._reinterpret(self.main.dtype, self.main.block_type.shape, self.main.layout)
        tma.async_copy_global_to_shared(self.main, [b, row, group, 0], bar, buf, wanted)
        if self.rest is not None:
            buf_rest = to.rest._reinterpret(self.rest.dtype, self.rest.block_type.shape, self.rest.layout)
            tma.async_copy_global_to_shared(self.rest, [b, row, group, 64], bar, buf_rest, wanted)


@aggregate
class Global:
    """A head of q, k, v, out or one of their gradients in global memory, (L, D)."""

    blocks: Boxes  # of 64 rows
    tail: Boxes | gl.constexpr  # of 16 rows; None for what is only written
    b: gl.tensor  # the sequence
    group: gl.tensor  # of the 3H of qkv, or the H of out

    @gluon.jit
    def load(self, row, to, bar, wanted=True):
        """Load 64 rows into Shared, asynchronously."""
        self.blocks.load(self.b, row, self.group, to, bar, wanted)

    @gluon.jit
    def store(self, row, value, via):
        """Store 64 rows from Registers through Shared, asynchronously; TMA drops rows past L and columns past D."""
        main, rest = self.blocks.main, self.blocks.rest
        via.main.store(value.main.to(main.dtype))
        if rest is not None:
            via.rest.store(value.rest.to(main.dtype))
        fence_async_shared()
        buf = via.main._reinterpret(main.dtype, main.block_type.shape, main.layout)
        tma.async_copy_shared_to_global(main, [self.b, row, self.group, 0], buf)
        if rest is not None:
            buf_rest = via.rest._reinterpret(main.dtype, rest.block_type.shape, rest.layout)
            tma.async_copy_shared_to_global(rest, [self.b, row, self.group, 64], buf_rest)


@aggregate
class Pair:
    """k and v, or q and dout, or their gradients, in the same place; all operations apply to both."""

    qk: Global | Head | Shared | Registers  # q or k, an operand of the scores s = q k^T
    vo: Global | Head | Shared | Registers  # v or dout, an operand of their gradient dp = dout v^T

    @gluon.jit
    def block(self, i):
        """Return one block of Heads."""
        return Pair(self.qk.blocks.index(i), self.vo.blocks.index(i))

    @gluon.jit
    def tail(self):
        """Return the tail of Heads."""
        return Pair(self.qk.tail, self.vo.tail)

    @gluon.jit
    def cut(self, ROWS: gl.constexpr):
        return Pair(self.qk.cut(ROWS), self.vo.cut(ROWS))

    @gluon.jit
    def to_registers(self, layout: gl.constexpr):
        return Pair(self.qk.to_registers(layout), self.vo.to_registers(layout))


@gluon.jit
def shared_rows(dtype: gl.constexpr, rows: gl.constexpr, WIDE: gl.constexpr):
    """Return new Shared memory for `rows`: [64], or [blocks, 64]."""
    main = gl.allocate_shared_memory(dtype, rows + [64], SWIZZLE_128)
    rest = None
    if WIDE:
        rest = gl.allocate_shared_memory(dtype, rows + [16], SWIZZLE_32)
    return Shared(main, rest)


@gluon.jit
def shared_head(dtype: gl.constexpr, BLOCKS: gl.constexpr, TAIL: gl.constexpr, WIDE: gl.constexpr):
    """Return new shared memory for a Head."""
    blocks = shared_rows(dtype, [BLOCKS, 64], WIDE)
    tail = None
    if TAIL:
        tail = shared_rows(dtype, [16], WIDE)
    return Head(blocks, tail)


@gluon.jit
def zeros(WIDE: gl.constexpr):
    """Return accumulators for a block of 64 rows, at zero."""
    rest = None
    if WIDE:
        rest = gl.zeros([64, 16], gl.float32, MMA_16)
    return Registers(gl.zeros([64, 64], gl.float32, MMA_64), rest)


@gluon.jit
def down(x, beside):
    """Return x (rows,), in any layout, as a column (rows, 1) beside another tensor (rows, N)."""
    layout: gl.constexpr = gl.SliceLayout(1, beside.type.layout)
    return gl.expand_dims(gl.convert_layout(x, layout), 1)


@gluon.jit
def masked(x, first, L, other):
    """Return x (rows, N), scores of N keys from `first` on, with `other` for those past L."""
    N: gl.constexpr = x.shape[1]
    keys = first + gl.arange(0, N, layout=gl.SliceLayout(0, x.type.layout))
    return gl.where(gl.expand_dims(keys < L, 0), x, other)


@gluon.jit
def statistic(pointer, first, L, other, N: gl.constexpr, layout: gl.constexpr):
    """Load lse or delta of N rows; past row L they are infinite and 0: a padded query has no weight."""
    at = first + gl.arange(0, N, layout=layout)
    return gl.load(pointer + at, mask=at < L, other=other)


@gluon.jit
def rows_by_rows(x, y):
    """Start x y^T and return it in flight: x (64, D) Registers or Shared, y (N, D) Shared -> (64, N) fp32."""
    N: gl.constexpr = y.main.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    s = gl.zeros([64, N], gl.float32, layout)
    s = warpgroup_mma(x.main, y.main.permute([1, 0]), s, use_acc=False, is_async=True)
    if y.rest is not None:
        s = warpgroup_mma(x.rest, y.rest.permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def left(p, dtype: gl.constexpr, layout: gl.constexpr = LEFT):
    """Return p (64, N), or (16, N) in LEFT_SMALL, as the next product's left operand: the same registers, halved."""
    return gl.convert_layout(p.to(dtype), layout)


@gluon.jit
def accumulate(p, y, a):
    """Start a + p y, or p y where a is None, and return it: p (64, N) from `left`, y (N, D) Shared, a (64, D)."""
    old: gl.constexpr = a is not None
    if not old:
        a = zeros(y.rest is not None)
    main = warpgroup_mma(p, y.main, a.main, use_acc=old, is_async=True)
    rest = None
    if y.rest is not None:
        rest = warpgroup_mma(p, y.rest, a.rest, use_acc=old, is_async=True)
    return Registers(main, rest)


@gluon.jit
def tail_zeros(WIDE: gl.constexpr):
    """Return accumulators for the 16 rows of a tail, at zero."""
    rest = None
    if WIDE:
        rest = gl.zeros([16, 16], gl.float32, SMALL)
    return Registers(gl.zeros([16, 64], gl.float32, SMALL), rest)


@gluon.jit
def tail_rows_by_rows(x, y):
    """Return x y^T: x (16, D) Registers, y (N, D) Shared -> (16, N) fp32."""
    N: gl.constexpr = y.main.shape[0]
    s = gl.zeros([16, N], gl.float32, SMALL)
    s = mma_v2(x.main, y.main.permute([1, 0]).load(RIGHT_SMALL), s)
    if y.rest is not None:
        s = mma_v2(x.rest, y.rest.permute([1, 0]).load(RIGHT_SMALL), s)
    return s


@gluon.jit
def tail_accumulate(p, y, a, shrink=None):
    """Return a + p y, a's rows times `shrink` (16,) first: p (16, N) from `left`, y (N, D) Shared, a (16, D)."""
    main = mma_v2(p, y.main.load(RIGHT_SMALL), a.main if shrink is None else a.main * down(shrink, a.main))
    rest = None
    if y.rest is not None:
        rest = mma_v2(p, y.rest.load(RIGHT_SMALL), a.rest if shrink is None else a.rest * down(shrink, a.rest))
    return Registers(main, rest)


@gluon.jit
def tail_store(pointer, value, first, L, stride, D: gl.constexpr):
    """Store the rows of a tail (16, D) straight to global memory: at most 16."""
    rows = first + gl.arange(0, 16, layout=gl.SliceLayout(1, SMALL))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, SMALL))
    at = pointer + gl.expand_dims(rows, 1) * stride
    inside = gl.expand_dims(rows < L, 1)
    gl.store(at + gl.expand_dims(columns, 0), value.main.to(pointer.dtype.element_ty), mask=inside)
    if value.rest is not None:
        columns_rest = 64 + gl.arange(0, 16, layout=gl.SliceLayout(0, SMALL))
        inside = inside & gl.expand_dims(columns_rest < D, 0)
        gl.store(at + gl.expand_dims(columns_rest, 0), value.rest.to(pointer.dtype.element_ty), mask=inside)


@gluon.jit
def narrow_store(pointer, value, first, L, h, H: gl.constexpr, D: gl.constexpr):
    """Store a block of rows (64, D) of head h in e4m3, straight to global memory: see `narrow`."""
    x = value.main.reshape([64, 8, 4, 2]).permute([0, 2, 1, 3]).reshape([64, 64])
    x = gl.convert_layout(x, NARROW_64)
    rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, NARROW_64))
    columns = h * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, NARROW_64))
    at = pointer + gl.expand_dims(rows, 1) * (H * D) + gl.expand_dims(columns, 0)
    gl.store(at, x.to(gl.float8e4nv), mask=gl.expand_dims(rows < L, 1))
    if value.rest is not None:
        rows_rest = first + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA_16))
        columns_rest = gl.arange(0, 16, layout=gl.SliceLayout(0, MMA_16))
        at_rest = pointer + gl.expand_dims(rows_rest, 1) * (H * D) + H * 64 + h * (D - 64)
        inside = gl.expand_dims(rows_rest < L, 1) & gl.expand_dims(columns_rest < D - 64, 0)
        gl.store(at_rest + gl.expand_dims(columns_rest, 0), value.rest.to(gl.float8e4nv), mask=inside)


@gluon.jit
def narrow_tail_store(pointer, value, first, L, h, H: gl.constexpr, D: gl.constexpr):
    """Store the rows of a tail (16, D) of head h, as `narrow_store` does for a block."""
    rows = first + gl.arange(0, 16, layout=gl.SliceLayout(1, SMALL))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, SMALL))
    place = h * 64 + column % 8 // 2 * 16 + column // 8 * 2 + column % 2
    at = pointer + gl.expand_dims(rows, 1) * (H * D)
    inside = gl.expand_dims(rows < L, 1)
    gl.store(at + gl.expand_dims(place, 0), value.main.to(gl.float8e4nv), mask=inside)
    if value.rest is not None:
        column_rest = gl.arange(0, 16, layout=gl.SliceLayout(0, SMALL))
        inside = inside & gl.expand_dims(column_rest < D - 64, 0)
        place_rest = H * 64 + h * (D - 64) + column_rest
        gl.store(at + gl.expand_dims(place_rest, 0), value.rest.to(gl.float8e4nv), mask=inside)


@gluon.constexpr_function
def row_bytes(WIDE):
    """Return how many bytes per row TMA brings."""
    return 160 if WIDE else 128


def cut(L: int) -> dict[str, int | bool]:
    """Return how the L tokens of a head are cut into rows.

    Returns:
        BLOCKS: blocks of 64.
        TAIL: whether the at most 16 tokens past them (258 = 4 * 64 + 2) are a tail: 16 rows, with small products.
        RAGGED: whether the last block has fewer than 64 tokens: no tail, and the keys past L are masked.
    """
    tail = L > 64 and 0 < L % 64 <= 16
    return {"BLOCKS": L // 64 if tail else cdiv(L, 64), "TAIL": tail, "RAGGED": not tail and L % 64 > 0}


def narrow(H: int, D: int) -> list[int]:
    """Return the order of the H * D features of attention's e4m3 result.

    First come the first 64 features of each head, arranged so that a thread's 16 (columns 2 q and 2 q + 1 of each 8)
    are adjacent, then the remaining ones of each head.
    """
    main = [8 * j + 2 * q + e for q in range(4) for j in range(8) for e in range(2)]
    return [h * D + c for h in range(H) for c in main] + [h * D + c for h in range(H) for c in range(64, D)]


def boxes(t: Tensor, D: int, rows: int | None) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Return `Boxes` of that many rows of a contiguous t (B, L, ..., D), as a kernel's arguments; none for no rows."""
    if not rows:
        return None, None
    t = t.view(t.shape[0], t.shape[1], -1, D)
    return descriptor(t, 1, rows, 1, 64), descriptor(t, 1, rows, 1, 16) if D > 64 else None
