"""How the sm_90 GEMM's tiles, and their steps of K, are divided among programs, and how programs share a tile.

Whole tiles are taken in turns. Where these would leave multiprocessors idle, the steps of all tiles stand in a row, a
tile after the other, and each program takes an equal part of it (stream-K: Osama et al., 2023). Programs that share a
tile leave their sums in global memory, and the last to arrive adds them up: in the order of the steps, whoever it is,
so that two runs give the same bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.hopper import barrier, mma


@aggregate
class Shares:
    """How the steps of all tiles are divided among the programs."""

    tiles: gl.tensor
    steps: gl.tensor  # of a tile
    parts: gl.tensor  # (2 programs, 2, 64 SPAN) fp32: what programs hand in of the two tiles that they may share
    arrivals: gl.tensor  # (tiles, 2) int32: how many have handed in; zero before a launch and after it
    SPAN: gl.constexpr  # tokens of a tile
    MOST: gl.constexpr  # programs that share a tile, at most; 1 where tiles are whole

    @gluon.jit
    def first(self, program):
        """Return the first of a program's steps, counted over all tiles."""
        return program * (self.tiles * self.steps) // gl.num_programs(0)

    @gluon.jit
    def tiles_of_mine(self):
        """Return the range of this program's tiles: first, end, stride."""
        if self.MOST == 1:
            mine = gl.program_id(0), self.tiles, gl.num_programs(0)
        else:
            end = self.first(gl.program_id(0) + 1)
            mine = self.first(gl.program_id(0)) // self.steps, (end + self.steps - 1) // self.steps, 1
        return mine

    @gluon.jit
    def steps_of(self, tile):
        """Return this program's first step of a tile, and the end of its steps."""
        if self.MOST == 1:
            mine = 0, self.steps
        else:
            before = tile * self.steps
            start = gl.maximum(self.first(gl.program_id(0)) - before, 0)
            mine = start, gl.minimum(self.first(gl.program_id(0) + 1) - before, self.steps)
        return mine

    @gluon.jit
    def sharers(self, tile):
        """Return the first and the last program that have steps of a tile."""
        total = self.tiles * self.steps
        before = tile * self.steps
        return (
            ((before + 1) * gl.num_programs(0) - 1) // total,
            ((before + self.steps) * gl.num_programs(0) - 1) // total,
        )

    @gluon.jit
    def place(self, program, tile, WHO: gl.constexpr, j: gl.constexpr, PART: gl.constexpr):
        """Return where a program's sums of part j [64, PART] of a tile are: 8 columns of a row side by side."""
        lay: gl.constexpr = mma(PART)
        row = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, lay)), 1)
        col = gl.expand_dims(gl.arange(0, PART, layout=gl.SliceLayout(0, lay)), 0)
        late = (self.first(program) < tile * self.steps).to(gl.int32)  # not the program's first tile but its last
        slot = (program * 2 + late) * 2 + WHO
        return self.parts + slot * (64 * self.SPAN) + j * (64 * PART) + ((col >> 3 << 9) + row * 8 + (col & 7))

    @gluon.jit
    def leave(self, xs, tile, WHO: gl.constexpr):
        """Write this program's parts of a tile where whoever finishes it reads them, this program too."""
        for j in gl.static_range(len(xs)):
            gl.store(self.place(gl.program_id(0), tile, WHO, j, xs[j].shape[1]), xs[j])

    @gluon.jit
    def hand_in(self, tile, WHO: gl.constexpr):
        """Announce that this program has written its sums of a tile, and return whether it must finish the tile."""
        finish = gl.to_tensor(True)
        if self.MOST > 1:
            start, end = self.sharers(tile)
            if start != end:
                barrier()  # all of it is written before one thread says so
                counter = self.arrivals + tile * 2 + WHO
                finish = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == end - start
                if finish:
                    gl.store(counter, 0)
        return finish

    @gluon.jit
    def collected(self, tile, WHO: gl.constexpr, TOKENS: gl.constexpr, PART: gl.constexpr):
        """Return a tile's parts, added up over the programs that share it.

        All of it before the epilogue, whose barriers would have each part's loads wait for the part before it.
        """
        start, end = self.sharers(tile)
        found = ()
        for j in gl.static_range(TOKENS // PART):
            total = gl.load(self.place(start, tile, WHO, j, PART), cache_modifier=".cg")
            for n in gl.static_range(1, self.MOST):
                where = self.place(start + n, tile, WHO, j, PART)
                total += gl.load(where, mask=start + n <= end, other=0.0, cache_modifier=".cg")
            found = found + (total,)
        return found
