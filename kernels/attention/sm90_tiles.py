"""The parts of the Hopper attention kernels: rows of a head in global memory, shared memory, registers; their products.

Legend: B batch, L tokens, H heads, D head dim. Rows of a head are a tuple of one or two pieces: the first 64 columns,
and for a larger D (72, 80: WIDE) the next 16, zero past D. A head is blocks of 64 rows and, if `cut` says so, a tail.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mma_v2, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.hopper import mma
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

LOG2E = 1.4426950408889634
SMALL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]))  # 16 rows, a quarter of the columns a warp
LEFT = gl.constexpr(gl.DotOperandLayout(0, mma(64), 2))
LEFT_SMALL = gl.constexpr(gl.DotOperandLayout(0, SMALL.value, 2))
RIGHT_SMALL = gl.constexpr(gl.DotOperandLayout(1, SMALL.value, 2))
NARROW_64 = gl.constexpr(  # what a thread of `mma(64)` holds of a row, side by side in `narrow` order
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)


@gluon.constexpr_function
def swizzle(N):
    """Return the layout of rows of N columns, 16 or a multiple of 64, in shared memory."""
    return gl.NVMMASharedLayout(min(2 * N, 128), 16, 2)


# Rows of a head are a tuple of one or two pieces: tensors, shared memory, or descriptors of what TMA moves at once.


@gluon.jit
def pieces(main, rest):
    """Return the tuple of those that are not None: D = 64 has no rest, and there may be no tail."""
    found = () if main is None else (main,)
    if rest is not None:
        found = found + (rest,)
    return found


@gluon.jit
def scaled(x, factor):
    """Return x * factor, a number."""
    return [piece * factor for piece in x]


@gluon.jit
def scaled_rows(x, factor):
    """Return x * factor (rows,), one for each row, in any layout."""
    return [piece * down(factor, piece) for piece in x]


@gluon.jit
def index(x, i):
    """Return block i of rows in shared memory."""
    return [piece.index(i) for piece in x]


@gluon.jit
def reshaped(piece, ROWS: gl.constexpr, N: gl.constexpr):
    """Return a piece in shared memory as blocks of ROWS rows of N columns."""
    return piece._reinterpret(piece.dtype, [piece.numel // (ROWS * N), ROWS, N], swizzle(N))


@gluon.jit
def recut(x, ROWS: gl.constexpr):
    """Return rows in shared memory as blocks of ROWS."""
    return [reshaped(piece, ROWS, piece.shape[-1]) for piece in x]


@gluon.jit
def to_registers(x, layout: gl.constexpr):
    """Return a block in shared memory as left operands."""
    return [piece.load(layout) for piece in x]


@gluon.jit
def fetch(boxes, b, row, group, to, bar, wanted=True):
    """Load rows from `row` on into shared memory, asynchronously; TMA fills with zeros past L or D."""
    for i in gl.static_range(len(boxes)):
        buf = to[i]._reinterpret(boxes[i].dtype, boxes[i].block_type.shape, boxes[i].layout)
        tma.async_copy_global_to_shared(boxes[i], [b, row, group, 64 * i], bar, buf, wanted)


@aggregate
class Head:
    """All rows of a head, or a statistic of them, in shared memory."""

    blocks: gl.tuple | gl.shared_memory_descriptor  # (BLOCKS, 64, D), or of a statistic (BLOCKS, 64)
    tail: gl.tuple | gl.shared_memory_descriptor | gl.constexpr  # (16, D) or (16,); None where there is none

    @gluon.jit
    def load(self, source, bar):
        """Load all rows of `source`, Global, asynchronously."""
        BLOCKS: gl.constexpr = self.blocks[0].shape[0]
        ROWS: gl.constexpr = self.blocks[0].shape[1]
        for i in gl.static_range(BLOCKS):
            source.load(i * ROWS, index(self.blocks, i), bar)
        if self.tail is not None:
            fetch(source.tail, source.b, BLOCKS * ROWS, source.group, self.tail, bar)

    @gluon.jit
    def recut(self, ROWS: gl.constexpr):
        """Return the same rows, the blocks of ROWS."""
        return Head(recut(self.blocks, ROWS), self.tail)


@aggregate
class Global:
    """A head of q, k, v, out or one of their gradients in global memory, (L, D)."""

    blocks: gl.tuple  # of (B, L, groups, D), in boxes (1, 64, 1, 64) and (1, 64, 1, 16), these from column 64 on
    tail: gl.tuple  # in boxes of 16 rows
    b: gl.tensor  # the sequence
    group: gl.tensor  # of the 3H of qkv, or the H of out

    @gluon.jit
    def load(self, row, to, bar, wanted=True):
        """Load 64 rows into shared memory, asynchronously."""
        fetch(self.blocks, self.b, row, self.group, to, bar, wanted)

    @gluon.jit
    def store(self, row, value, via):
        """Store 64 rows from registers through shared memory, asynchronously; TMA drops what is past L or D."""
        for i in gl.static_range(len(via)):
            via[i].store(value[i].to(via[i].dtype))
        fence_async_shared()
        for i in gl.static_range(len(via)):
            box = self.blocks[i]
            buf = via[i]._reinterpret(box.dtype, box.block_type.shape, box.layout)
            tma.async_copy_shared_to_global(box, [self.b, row, self.group, 64 * i], buf)


@aggregate
class Pair:
    """k and v, or q and dout, or their gradients, in the same place; all operations apply to both."""

    qk: Global | Head | gl.tuple  # q or k, an operand of the scores s = q k^T
    vo: Global | Head | gl.tuple  # v or dout, an operand of their gradient dp = dout v^T

    @gluon.jit
    def block(self, i):
        """Return one block of Heads."""
        return Pair(index(self.qk.blocks, i), index(self.vo.blocks, i))

    @gluon.jit
    def tail(self):
        """Return the tail of Heads."""
        return Pair(self.qk.tail, self.vo.tail)

    @gluon.jit
    def to_registers(self, layout: gl.constexpr):
        return Pair(to_registers(self.qk, layout), to_registers(self.vo, layout))


@gluon.jit
def shared_rows(dtype: gl.constexpr, rows: gl.constexpr, WIDE: gl.constexpr):
    """Return new shared memory for `rows`: [64], or [blocks, 64]."""
    rest = None
    main = gl.allocate_shared_memory(dtype, rows + [64], swizzle(64))
    if WIDE:
        rest = gl.allocate_shared_memory(dtype, rows + [16], swizzle(16))
    return pieces(main, rest)


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
    rest = gl.zeros([64, 16], gl.float32, mma(16)) if WIDE else None
    return pieces(gl.zeros([64, 64], gl.float32, mma(64)), rest)


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
    """Start x y^T and return it in flight: x (64, D), y (N, D) in shared memory -> (64, N) fp32."""
    N: gl.constexpr = y[0].shape[0]
    s = gl.zeros([64, N], gl.float32, mma(N))
    for i in gl.static_range(len(y)):
        s = warpgroup_mma(x[i], y[i].permute([1, 0]), s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def left(p, dtype: gl.constexpr, layout: gl.constexpr = LEFT):
    """Return p (64, N), or (16, N) in LEFT_SMALL, as the next product's left operand: the same registers, halved."""
    return gl.convert_layout(p.to(dtype), layout)


@gluon.jit
def accumulate(p, y, a):
    """Start a + p y, or p y where a is (), and return it: p (64, N) from `left`, y (N, D) shared, a (64, D)."""
    old: gl.constexpr = len(a) > 0
    if not old:
        a = zeros(len(y) > 1)
    found = ()
    for i in gl.static_range(len(y)):
        found = found + (warpgroup_mma(p, y[i], a[i], use_acc=old, is_async=True),)
    return found


@gluon.jit
def tail_zeros(WIDE: gl.constexpr):
    """Return accumulators for the 16 rows of a tail, at zero."""
    rest = gl.zeros([16, 16], gl.float32, SMALL) if WIDE else None
    return pieces(gl.zeros([16, 64], gl.float32, SMALL), rest)


@gluon.jit
def tail_rows_by_rows(x, y):
    """Return x y^T: x (16, D) in registers, y (N, D) in shared memory -> (16, N) fp32."""
    N: gl.constexpr = y[0].shape[0]
    s = gl.zeros([16, N], gl.float32, SMALL)
    for i in gl.static_range(len(y)):
        s = mma_v2(x[i], y[i].permute([1, 0]).load(RIGHT_SMALL), s)
    return s


@gluon.jit
def tail_accumulate(p, y, a, shrink=None):
    """Return a + p y, a's rows times `shrink` (16,) first: p (16, N) from `left`, y (N, D) shared, a (16, D)."""
    found = ()
    for i in gl.static_range(len(y)):
        right = y[i].load(RIGHT_SMALL)
        found = found + (mma_v2(p, right, a[i] if shrink is None else a[i] * down(shrink, a[i])),)
    return found


@gluon.jit
def tail_store(pointer, value, first, L, stride, D: gl.constexpr):
    """Store the rows of a tail (16, D) straight to global memory: at most 16."""
    rows = first + gl.arange(0, 16, layout=gl.SliceLayout(1, SMALL))
    for i in gl.static_range(len(value)):
        columns = 64 * i + gl.arange(0, value[i].shape[1], layout=gl.SliceLayout(0, SMALL))
        at = pointer + gl.expand_dims(rows, 1) * stride
        inside = gl.expand_dims(rows < L, 1)
        if i > 0:
            inside = inside & gl.expand_dims(columns < D, 0)
        gl.store(at + gl.expand_dims(columns, 0), value[i].to(pointer.dtype.element_ty), mask=inside)


@gluon.jit
def narrow_store(pointer, value, first, L, h, H: gl.constexpr, D: gl.constexpr):
    """Store a block of rows (64, D) of head h in e4m3, straight to global memory: see `narrow`."""
    x = value[0].reshape([64, 8, 4, 2]).permute([0, 2, 1, 3]).reshape([64, 64])
    x = gl.convert_layout(x, NARROW_64)
    rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, NARROW_64))
    columns = h * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, NARROW_64))
    at = pointer + gl.expand_dims(rows, 1) * (H * D) + gl.expand_dims(columns, 0)
    gl.store(at, x.to(gl.float8e4nv), mask=gl.expand_dims(rows < L, 1))
    if D > 64:
        rows_rest = first + gl.arange(0, 64, layout=gl.SliceLayout(1, mma(16)))
        columns_rest = gl.arange(0, 16, layout=gl.SliceLayout(0, mma(16)))
        at_rest = pointer + gl.expand_dims(rows_rest, 1) * (H * D) + H * 64 + h * (D - 64)
        inside = gl.expand_dims(rows_rest < L, 1) & gl.expand_dims(columns_rest < D - 64, 0)
        gl.store(at_rest + gl.expand_dims(columns_rest, 0), value[1].to(gl.float8e4nv), mask=inside)


@gluon.jit
def narrow_tail_store(pointer, value, first, L, h, H: gl.constexpr, D: gl.constexpr):
    """Store the rows of a tail (16, D) of head h, as `narrow_store` does for a block."""
    rows = first + gl.arange(0, 16, layout=gl.SliceLayout(1, SMALL))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, SMALL))
    place = h * 64 + column % 8 // 2 * 16 + column // 8 * 2 + column % 2
    at = pointer + gl.expand_dims(rows, 1) * (H * D)
    inside = gl.expand_dims(rows < L, 1)
    gl.store(at + gl.expand_dims(place, 0), value[0].to(gl.float8e4nv), mask=inside)
    if D > 64:
        column_rest = gl.arange(0, 16, layout=gl.SliceLayout(0, SMALL))
        inside = inside & gl.expand_dims(column_rest < D - 64, 0)
        place_rest = H * 64 + h * (D - 64) + column_rest
        gl.store(at + gl.expand_dims(place_rest, 0), value[1].to(gl.float8e4nv), mask=inside)


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
    """Return what TMA moves of that many rows of a contiguous t (B, L, ..., D), as a kernel's arguments, or Nones."""
    if not rows:
        return None, None
    t = t.view(t.shape[0], t.shape[1], -1, D)
    return descriptor(t, 1, rows, 1, 64), descriptor(t, 1, rows, 1, 16) if D > 64 else None
