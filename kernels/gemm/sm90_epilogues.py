"""The epilogues on sm_90: a function for each, made of shared pieces.

A consumer goes through its [64 features, TOKENS] in parts of PART tokens. Each part leaves, and its side input (the
residual, GELU's h) arrives, by TMA through the consumer's own staging buffers.
"""

from dataclasses import dataclass

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from uvit_fast.kernels.gemm.contract import G0, G1, G2
from uvit_fast.kernels.gemm.sm90_fragments import gate, pairs, rounded, widened
from uvit_fast.kernels.gemm.sm90_shares import Shares
from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.hopper import mma


@gluon.jit
def touch(rstd, TOKENS: gl.constexpr):
    """Send for a tile's rstd into L1, where `Epilogue.rstd_of` will look for it after the main loop."""
    lay: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    hint: gl.constexpr = "prefetch.global.L1 [$1]; mov.b32 $0, 0;"
    line = (rstd + gl.arange(0, TOKENS, layout=lay)).to(gl.int64)
    gl.inline_asm_elementwise(hint, "=r,l", [line], dtype=gl.int32, is_pure=False, pack=1)


@aggregate
class Place:
    """Where a consumer's part of a tile lies in the result."""

    feature: gl.tensor  # its first of 64 features
    token: gl.tensor  # its first token
    down: gl.tensor  # which of the tiles of tokens it is in
    tile: gl.tensor  # which of all tiles
    WHO: gl.constexpr  # the consumer, 0 or 1


@aggregate
class Ahead:
    """What a consumer has requested from global memory before the main loop."""

    shift: gl.tensor  # (64,) fp32, the bias; a number where there is none
    scale: gl.tensor  # (64,) fp32, the weight's; a number where it has none
    rstd: gl.tensor  # (PART,) fp32, of the first part's tokens, with FOLD "stats"; else a number


@dataclass(unsafe_hash=True)  # frozen, it would take thrice the time to make
class How:
    """What is constant in a kernel of the GEMM."""

    KIND: str  # of contract.CASES
    STAGES: int
    LEAVING: int  # staging buffers of a consumer, of each result that leaves
    ARRIVING: int  # and of what arrives
    FOLD: str  # what the rstd of a LayerNorm that is folded in comes from: "stats", "sums"; "" without one
    CHUNKS: int  # FOLD "sums": of 64 features each
    AHEAD: bool  # whether a tile's rstd is asked for into L1 ahead
    HAS_BIAS: bool
    SCALED: bool  # whether the weight has a scale per row
    TWO: bool  # whether there is a second source
    TRANSPOSED: bool
    SUMS: bool  # whether the result's sums are written
    PAIRED: bool  # whether the result is e4m3, in the order of `pairs`
    WIDE: bool  # whether out is written
    NARROW: bool  # whether the result is written once more, in e4m3
    MOST: int  # programs that share a tile, at most
    PAIRS: int  # of consumers, which take a program's tiles in turns
    HALVES: bool  # whether each consumer takes half of a tile's K, not of its features
    EARLY: int  # steps whose weights are asked for before the kernel before this one has ended; 0: it begins after that


@aggregate
class Memory:
    """What an epilogue reads and writes without TMA."""

    bias: gl.tensor  # (N,); SCALED (2, N): bias and scale of the weight's rows
    rstd: gl.tensor  # FOLD "stats": (M and a tile more) fp32; "sums": (CHUNKS, 2, M) fp32, of the tokens
    eps: gl.tensor  # of the LayerNorm that is folded in
    partial: gl.tensor  # (ceil(M / TOKENS), N) fp32: column sums of out (gelu_backward)
    sums: gl.tensor  # (N / 64, 2, M) fp32: see layernorm.sums
    narrow: gl.tensor  # (M, N) e4m3
    M: gl.tensor
    N: gl.tensor


@aggregate
class Staging:
    """An epilogue's shared memory."""

    leaving: gl.shared_memory_descriptor  # (2 LEAVING, PART, 64): out on its way
    leaving2: gl.shared_memory_descriptor  # likewise: second
    arriving: gl.shared_memory_descriptor  # (2 ARRIVING, PART, 64): side on its way
    arrived: gl.shared_memory_descriptor  # (2 ARRIVING) barriers
    rstds: gl.shared_memory_descriptor  # FOLD "sums": (2, TOKENS) fp32, a consumer's own


@aggregate
class Epilogue:
    """The destinations of the results, and the inputs beside the accumulator."""

    out: tma.tensor_descriptor  # (M, N), boxes of [PART, 64]; PAIRED (M, N / 2), boxes of [PART, 32]
    second: tma.tensor_descriptor  # (M, N), likewise: GELU's h (gelu_save), GELU's value (gelu_backward)
    side: tma.tensor_descriptor  # (M, N), likewise: the residual, or GELU's h (gelu_backward)
    memory: Memory
    staging: Staging
    shares: Shares
    LEAVING: gl.constexpr  # buffers per consumer
    ARRIVING: gl.constexpr
    TOKENS: gl.constexpr  # of a tile
    PART: gl.constexpr
    LATE: gl.constexpr  # FOLD "sums": whether rstd is taken from them after the main loop, during which they come
    how: gl.constexpr  # How

    @gluon.jit
    def take_sums(self, at):
        """Ask for the sums of a tile's tokens, with FOLD "sums", and return them and which there are."""
        taken = ()
        if self.how.FOLD == "sums":
            across: gl.constexpr = min(32, self.TOKENS // 4)  # lanes over the tokens
            rows: gl.constexpr = triton.next_power_of_2(self.how.CHUNKS)
            lay: gl.constexpr = gl.BlockedLayout(
                [max(rows * across // 32, 1), 1], [32 // across, across], [1, 4], [0, 1]
            )
            chunk = gl.expand_dims(gl.arange(0, rows, layout=gl.SliceLayout(1, lay)), 1)
            token = gl.expand_dims(at.token + gl.arange(0, self.TOKENS, layout=gl.SliceLayout(0, lay)), 0)
            where = self.memory.rstd + chunk * 2 * self.memory.M + token
            known = (chunk < self.how.CHUNKS) & (token < self.memory.M)
            summed = gl.load(where, mask=known, other=0.0)
            squares = gl.load(where + self.memory.M, mask=known, other=0.0)
            taken = (summed, squares, known)
        return taken

    @gluon.jit
    def measure(self, at, taken):
        """Take the rstd of a tile's tokens from their sums, with FOLD "sums": see `fold.prepare`."""
        if self.how.FOLD == "sums":
            summed, squares, known = taken
            mean = gl.sum(summed, axis=0) * (1.0 / (self.how.CHUNKS * 64))
            apart = gl.where(known, summed * (1.0 / 64) - gl.expand_dims(mean, 0), 0.0)
            variance = gl.sum(squares + 64 * apart * apart, axis=0) * (1.0 / (self.how.CHUNKS * 64))
            self.staging.rstds.index(at.WHO).store(1.0 / gl.sqrt(variance + self.memory.eps))

    @gluon.jit
    def ask(self, at):
        """Request what the epilogue reads from global memory, so that it arrives during the main loop."""
        lay: gl.constexpr = mma(self.PART)
        if self.how.KIND == "residual":
            tma.store_wait(0)
        for b in gl.static_range(self.ARRIVING):
            self.fetch(at, b)
        shift, scale, rstd = 0.0, 0.0, 0.0
        row = at.feature + gl.arange(0, 64, layout=gl.SliceLayout(1, lay))
        if self.how.HAS_BIAS:
            shift = gl.load(self.memory.bias + row, mask=row < self.memory.N, other=0.0).to(gl.float32)
        if self.how.SCALED:
            scale = gl.load(self.memory.bias + self.memory.N + row, mask=row < self.memory.N, other=0.0)
        if self.how.FOLD == "stats":
            if self.how.AHEAD:
                touch(self.memory.rstd + at.token, self.TOKENS)
            rstd = self.rstd_of(at, 0)
        return Ahead(shift, scale, rstd)

    @gluon.jit
    def rstd_of(self, at, j: gl.constexpr):
        """Return rstd of part j's tokens, in the layout of its columns.

        Past the last token there is memory to read, though nothing in it.
        """
        lay: gl.constexpr = mma(self.PART)
        if self.how.FOLD == "sums":
            found = self.staging.rstds.index(at.WHO).slice(j * self.PART, self.PART).load(gl.SliceLayout(0, lay))
        else:
            col = gl.arange(0, self.PART, layout=gl.SliceLayout(0, lay))
            found = gl.load(self.memory.rstd + at.token + j * self.PART + col)
        return found

    @gluon.jit
    def affine(self, x, ahead, at, j: gl.constexpr):
        """Return part j with all scales, the LayerNorm's and the bias, and the `Ahead` of the part after it."""
        if self.how.SCALED:
            x = x * gl.expand_dims(ahead.scale, 1)
        if self.how.FOLD == "sums":
            x = x * gl.expand_dims(self.rstd_of(at, j), 0)
        if self.how.FOLD == "stats":
            x = x * gl.expand_dims(ahead.rstd, 0)
            if j + 1 < self.TOKENS // self.PART:
                ahead = Ahead(ahead.shift, ahead.scale, self.rstd_of(at, j + 1))
        if self.how.HAS_BIAS:
            x = x + gl.expand_dims(ahead.shift, 1)
        return x, ahead

    @gluon.jit
    def fetch(self, at, j: gl.constexpr):
        """Request part j of the side input, into its own buffer."""
        b: gl.constexpr = at.WHO * self.ARRIVING + j % self.ARRIVING
        bar = self.staging.arrived.index(b)
        mbarrier.expect(bar, self.side.block_type.nbytes)
        tma.async_copy_global_to_shared(
            self.side, [at.token + j * self.PART, at.feature], bar, self.staging.arriving.index(b)
        )

    @gluon.jit
    def arrival(self, at, uses, j: gl.constexpr):
        """Return part j of the side input, fp32, and its buffer, which was used `uses` times before this tile."""
        lay: gl.constexpr = mma(self.PART)
        b: gl.constexpr = at.WHO * self.ARRIVING + j % self.ARRIVING
        mbarrier.wait(self.staging.arrived.index(b), (uses + j // self.ARRIVING) & 1)
        buf = self.staging.arriving.index(b)
        return widened(buf.permute([1, 0]).load(lay)), buf

    @gluon.jit
    def pass_by(self, at, uses):
        """Let what `ask` asked for come in: another program finishes this tile."""
        for b in gl.static_range(self.ARRIVING):
            mbarrier.wait(self.staging.arrived.index(at.WHO * self.ARRIVING + b), uses & 1)

    @gluon.jit
    def send(self, x, at, j: gl.constexpr, buf):
        """Send part j of the result, [64, PART], through its buffer [PART, 64]; write what follows from it."""
        if self.how.PAIRED:
            buf.permute([1, 0]).store(pairs(x))
            fence_async_shared()
            tma.async_copy_shared_to_global(self.out, [at.token + j * self.PART, at.feature // 2], buf)
        else:
            buf.permute([1, 0]).store(x.to(self.out.dtype))
            if self.how.WIDE:
                fence_async_shared()
                tma.async_copy_shared_to_global(self.out, [at.token + j * self.PART, at.feature], buf)
        if self.how.SUMS or self.how.NARROW:
            self.read_back(buf, at, j)

    @gluon.jit
    def send_two(self, x, y, at, j: gl.constexpr):
        """Send part j of out and of second at once: one fence and one barrier for both."""
        tma.store_wait(2 * (self.LEAVING - 1))
        x_buf = self.staging.leaving.index(at.WHO * self.LEAVING + j % self.LEAVING)
        y_buf = self.staging.leaving2.index(at.WHO * self.LEAVING + j % self.LEAVING)
        x_buf.permute([1, 0]).store(x.to(self.out.dtype))
        y_buf.permute([1, 0]).store(y.to(self.out.dtype))
        fence_async_shared()
        token = at.token + j * self.PART
        tma.async_copy_shared_to_global(self.out, [token, at.feature], x_buf)
        tma.async_copy_shared_to_global(self.second, [token, at.feature], y_buf)

    @gluon.jit
    def read_back(self, buf, at, j: gl.constexpr):
        """Write the result once more in e4m3, and of each token the sum of a part's 64 features, as rounded, and of
        the squares around their mean.

        They are read back from the staging buffer, where a thread finds many features of one token; the accumulator
        spreads them over all threads.
        """
        PART: gl.constexpr = self.PART
        lay: gl.constexpr = gl.BlockedLayout([1, PART * 64 // 128], [PART // 4, 128 // PART], [4, 1], [1, 0])
        x = widened(buf.load(lay))
        token = at.token + j * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, lay))
        inside = (token < self.memory.M) & (at.feature < self.memory.N)
        if self.how.NARROW:
            feature = at.feature + gl.arange(0, 64, layout=gl.SliceLayout(0, lay))
            where = gl.expand_dims(token.to(gl.int64) * self.memory.N, 1) + gl.expand_dims(feature, 0)
            gl.store(self.memory.narrow + where, x.to(gl.float8e4nv), mask=gl.expand_dims(inside, 1))
        if self.how.SUMS:
            total = gl.sum(x, axis=1)
            x = x - gl.expand_dims(total * (1.0 / 64), 1)
            first = self.memory.sums + at.feature // 64 * 2 * self.memory.M + token
            gl.store(first, total, mask=inside)
            gl.store(first + self.memory.M, gl.sum(x * x, axis=1), mask=inside)


@gluon.jit
def plain(e, xs, ahead, at):
    """Write out = x."""
    for j in gl.static_range(e.TOKENS // e.PART):
        x, ahead = e.affine(xs[j], ahead, at, j)
        tma.store_wait(e.LEAVING - 1)
        e.send(x, at, j, e.staging.leaving.index(at.WHO * e.LEAVING + j % e.LEAVING))


@gluon.jit
def gelu(e, xs, ahead, at):
    """Write out = GELU(2 x)."""
    for j in gl.static_range(e.TOKENS // e.PART):
        x, ahead = e.affine(xs[j], ahead, at, j)
        t, w = gate(x)
        x = x * t + x
        tma.store_wait(e.LEAVING - 1)
        e.send(x, at, j, e.staging.leaving.index(at.WHO * e.LEAVING + j % e.LEAVING))


@gluon.jit
def gelu_save(e, xs, ahead, at):
    """Write out = GELU(2 h), second = h = x. The backward sees h as rounded: it is rounded before the GELU."""
    for j in gl.static_range(e.TOKENS // e.PART):
        x, ahead = e.affine(xs[j], ahead, at, j)
        x = rounded(x, e.out.dtype)
        t, w = gate(x)
        e.send_two(x * t + x, x, at, j)


@gluon.jit
def residual(e, xs, ahead, at, uses):
    """Write out = x + side, which leaves from where the residual arrived."""
    PARTS: gl.constexpr = e.TOKENS // e.PART
    for j in gl.static_range(PARTS):
        x, ahead = e.affine(xs[j], ahead, at, j)
        h, buf = e.arrival(at, uses, j)
        e.send(x + h, at, j, buf)
        if j >= 1 and j - 1 + e.ARRIVING < PARTS:  # the buffer sent before this one is free soonest
            tma.store_wait(1)
            e.fetch(at, j - 1 + e.ARRIVING)


@gluon.jit
def gelu_backward(e, xs, ahead, at, uses):
    """Write out = x GELU'(2 h), second = GELU(2 h), partial = out's column sums; h = side."""
    PARTS: gl.constexpr = e.TOKENS // e.PART
    row: gl.constexpr = gl.SliceLayout(1, mma(e.PART))
    total = gl.zeros([64], gl.float32, row)
    for j in gl.static_range(PARTS):
        x, ahead = e.affine(xs[j], ahead, at, j)
        h, buf = e.arrival(at, uses, j)
        if j + e.ARRIVING < PARTS:  # h is in registers: its buffer is free
            e.fetch(at, j + e.ARRIVING)
        t, w = gate(h)
        y = h * t + h
        slope = w * (w * (2.5 * G2) + 1.5 * G1) + 0.5 * G0  # of v, halved
        x = x * ((y - y * t) * slope + (0.5 * t + 0.5))
        total += gl.sum(x, axis=1)
        e.send_two(x, y, at, j)
    feature = at.feature + gl.arange(0, 64, layout=row)
    gl.store(e.memory.partial + at.down * e.memory.N + feature, total, mask=feature < e.memory.N)
