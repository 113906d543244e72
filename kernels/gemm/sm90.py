"""The GEMM core for sm_90 in Gluon: persistent, two consumer warpgroups and a TMA producer.

A tile is transposed, 128 features x 256 tokens: each consumer holds 64 weight rows x 256 tokens in one accumulator
(wgmma n = 256), and both read the same stages. A consumer frees the stages it has read by itself, so the two drift
apart and the epilogue of one hides behind the main loop of the other.

Shared memory: 4 stages x (2 x 64 + 256) x 128 bytes + 2 x 16 KB of staging = 224 KB, and the barriers. Where such tiles
would leave multiprocessors idle, as with a single image, a tile has 64 tokens and eight stages. Operands are of 16
bits, or e4m3 (`sm90_fp8`), of which a stage holds twice as many.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from uvit_fast.kernels.gemm import sm90_weight_gradient
from uvit_fast.kernels.gemm.contract import CASES, Core, Product, results
from uvit_fast.kernels.gemm.sm90_epilogues import (
    Epilogue,
    Place,
    gelu,
    gelu_backward,
    gelu_save,
    parts,
    plain,
    residual,
)
from uvit_fast.kernels.gemm.sm90_ring import Ring, ring
from uvit_fast.kernels.layernorm.sums import CHUNK, TILE
from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

ROWS, TOKENS, BK = 64, 256, 64  # features per consumer, tokens per tile, K per stage
assert TOKENS == TILE, "statistics fill whole tiles"
assert ROWS == CHUNK, "a consumer's features are those whose sums are taken together"
STAGES = {TOKENS: 4, 64: 8}
STAGING = 128  # tokens that a consumer's staging buffers hold together
SHORT = 12  # steps of K, up to which asking for a tile's statistics ahead measured faster
FEW = {"tokens": 64, "part": 32}  # a tile where tokens are few


@aggregate
class Gemm:
    """A launch: what is multiplied, in which tiles, and what becomes of it."""

    w: tma.tensor_descriptor  # (N, K) in boxes of [64, BK]; TRANSPOSED (K, N), [BK, 64]
    x: tma.tensor_descriptor  # (M, K1), boxes of [TOKENS, BK]
    x2: tma.tensor_descriptor  # (M, K - K1), read with TWO
    ring: Ring  # weights for either consumer, and tokens
    epilogue: Epilogue
    across: gl.tensor  # tiles over the features
    tiles: gl.tensor
    steps: gl.tensor  # of K
    steps1: gl.tensor  # of those, from the first source
    TWO: gl.constexpr  # whether there is a second source


@gluon.jit
def _producer(g):
    BK: gl.constexpr = g.x.block_type.shape[1]
    BYTES: gl.constexpr = 2 * g.w.block_type.nbytes + g.x.block_type.nbytes
    step = 0
    for tile in range(gl.program_id(0), g.tiles, gl.num_programs(0)):
        feature = (tile % g.across) * 2 * 64
        token = (tile // g.across) * g.epilogue.TOKENS
        for k in range(g.steps):
            s, bar = g.ring.claim(step, BYTES)
            x = g.ring.b.index(s)
            if g.TWO:
                tma.async_copy_global_to_shared(g.x, [token, k * BK], bar, x, pred=k < g.steps1)
                tma.async_copy_global_to_shared(g.x2, [token, (k - g.steps1) * BK], bar, x, pred=k >= g.steps1)
            else:
                tma.async_copy_global_to_shared(g.x, [token, k * BK], bar, x)
            for c in gl.static_range(2):
                w = g.ring.a.index(s * 2 + c)
                if g.ring.A_TURNED:
                    tma.async_copy_global_to_shared(g.w, [k * BK, feature + c * 64], bar, w)
                else:
                    tma.async_copy_global_to_shared(g.w, [feature + c * 64, k * BK], bar, w)
            step += 1


@gluon.jit
def _product(ring, step, steps, TOKENS: gl.constexpr, WHO: gl.constexpr):
    """Return a consumer's [64, TOKENS] of a tile; one wgmma stays in flight, its predecessor's stage is freed."""
    DEEP: gl.constexpr = 256 // ring.b.dtype.primitive_bitwidth  # K of an instruction
    acc = gl.zeros([64, TOKENS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, DEEP]))
    w, x = ring.operands(step, WHO)
    acc = warpgroup_mma(w, x, acc, use_acc=False, is_async=True)
    for i in range(step + 1, step + steps):
        w, x = ring.operands(i, WHO)
        acc = warpgroup_mma(w, x, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        ring.free(i - 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    ring.free(step + steps - 1)
    return acc


@gluon.jit
def _consumer(g, WHO: gl.constexpr):
    e = g.epilogue
    step = 0
    done = 0  # tiles
    for tile in range(gl.program_id(0), g.tiles, gl.num_programs(0)):
        down = tile // g.across
        at = Place(((tile % g.across) * 2 + WHO) * 64, down * e.TOKENS, down, WHO)
        ahead = e.ask(at)
        xs = parts(_product(g.ring, step, g.steps, e.TOKENS, WHO), 64, e.TOKENS, e.PART)
        if e.KIND == "plain":
            plain(e, xs, ahead, at)
        elif e.KIND == "gelu":
            gelu(e, xs, ahead, at)
        elif e.KIND == "gelu_save":
            gelu_save(e, xs, ahead, at)
        elif e.KIND == "residual":
            residual(e, xs, ahead, at, done)
        else:
            gelu_backward(e, xs, ahead, at, done)
        step += g.steps
        done += 1
    tma.store_wait(0)


@gluon.jit
def gemm_kernel(
    w,  # (N, K), boxes of [64, BK]; with TRANSPOSED (K, N), boxes of [BK, 64]
    x,  # (M, K1), boxes of [TOKENS, BK]
    x2,  # (M, K - K1), read with TWO
    out,  # (M, N), boxes of [PART, 64]; with PAIRED (M, N / 2) int16, boxes of [PART, 32]
    second,  # (M, N): GELU's h (gelu_save), GELU's value (gelu_backward)
    side,  # (M, N): the residual, or GELU's h
    bias,  # (N,); with SCALED (3, N) fp32: bias, scale, row sums of the weight
    stats,  # (2, M, rounded up to whole tiles) fp32: mean, read with FOLD and SCALED, and rstd, read with FOLD
    narrow,  # (M, N) e4m3, written with NARROW
    partial,  # (ceil(M / TOKENS), N) fp32: column sums of out (gelu_backward)
    sums,  # (N / 64, 2, M) fp32, written with SUMS
    M,
    N,
    stride_stats,
    across,  # tiles over the features
    tiles,
    steps,  # of K
    steps1,  # of those, from the first source
    STAGES: gl.constexpr,
    ARRIVING: gl.constexpr,
    LEAVING: gl.constexpr,
    KIND: gl.constexpr,
    FOLD: gl.constexpr,
    AHEAD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    TWO: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    SUMS: gl.constexpr,
    SCALED: gl.constexpr,
    PAIRED: gl.constexpr,
    WIDE: gl.constexpr,
    NARROW: gl.constexpr,
):
    PART: gl.constexpr = out.block_type.shape[0]
    # Allocations apart: the compiler puts a barrier between any two uses of one. A residual's result leaves from the
    # residual's buffer.
    shape: gl.constexpr = out.block_type.shape
    leaving = gl.allocate_shared_memory(out.dtype, [2 * (LEAVING if LEAVING else ARRIVING)] + shape, out.layout)
    leaving2 = leaving
    if KIND == "gelu_save" or KIND == "gelu_backward":
        leaving2 = gl.allocate_shared_memory(out.dtype, [2 * LEAVING] + shape, out.layout)
    arriving = leaving
    if ARRIVING > 0 and LEAVING > 0:
        arriving = gl.allocate_shared_memory(out.dtype, [2 * ARRIVING] + shape, out.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [2 * max(ARRIVING, 1), 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * ARRIVING):
        mbarrier.init(arrived.index(i), count=1)
    epilogue = Epilogue(
        out=out,
        second=second,
        side=side,
        bias=bias,
        mean=stats,
        rstd=stats + stride_stats,
        partial=partial,
        sums=sums,
        narrow=narrow,
        M=gl.to_tensor(M),
        N=gl.to_tensor(N),
        leaving=leaving,
        leaving2=leaving2,
        arriving=arriving,
        arrived=arrived,
        KIND=KIND,
        LEAVING=LEAVING,
        ARRIVING=ARRIVING,
        TOKENS=x.block_type.shape[0],
        PART=PART,
        HAS_BIAS=HAS_BIAS,
        FOLD=FOLD,
        AHEAD=AHEAD,
        SUMS=SUMS,
        SCALED=SCALED,
        PAIRED=PAIRED,
        WIDE=WIDE,
        NARROW=NARROW,
    )
    g = Gemm(
        w=w,
        x=x,
        x2=x2,
        ring=ring(w, x, STAGES, TRANSPOSED, True),
        epilogue=epilogue,
        across=gl.to_tensor(across),
        tiles=gl.to_tensor(tiles),
        steps=gl.to_tensor(steps),
        steps1=gl.to_tensor(steps1),
        TWO=TWO,
    )
    gl.warp_specialize([(_consumer, (g, 0)), (_consumer, (g, 1)), (_producer, (g,))], [4, 1], [240, 24])


# Staging buffers of a consumer where so many fit: for what arrives, and for each result that leaves.
_STAGED = {
    "plain": lambda buffers: (0, buffers),
    "gelu": lambda buffers: (0, buffers),
    "gelu_save": lambda buffers: (0, buffers // 2),
    "residual": lambda buffers: (buffers, 0),  # the result leaves from where the residual arrived
    "gelu_backward": lambda buffers: (2, 1),
}


def arguments(
    epilogue: str,
    x: Tensor,
    linear: Linear,
    *,
    x2: Tensor | None = None,
    stats: Tensor | None = None,
    side: Tensor | None = None,
    overwrite: bool = False,
    sums: Tensor | None = None,
    transposed: bool = False,
    tokens: int = TOKENS,
    part: int = 64,
) -> tuple[tuple, dict, int, Product]:
    """Return the kernel's arguments, its launch options, the number of tiles, and the results."""
    w, bias = linear
    (M, K), N = x.shape, w.shape[1 if transposed else 0]
    across, down = cdiv(N, 2 * ROWS), cdiv(M, tokens)
    out, second = results(epilogue, x, N, side, overwrite)
    partial = x.new_empty(down, N, dtype=ACCUMULATE) if epilogue == "gelu_backward" else out
    out_box, x_box = descriptor(out, part, ROWS), descriptor(x, tokens, BK)
    steps = cdiv(K + (0 if x2 is None else x2.shape[1]), BK)
    args = (
        descriptor(w, BK, ROWS) if transposed else descriptor(w, ROWS, BK),
        x_box,
        x_box if x2 is None else descriptor(x2, tokens, BK),
        out_box,
        out_box if second is out else descriptor(second, part, ROWS),
        out_box if side is None else descriptor(side, part, ROWS),
        out if bias is None else bias,
        out if stats is None else stats,
        out,
        partial,
        partial if sums is None else sums,
        M,
        N,
        0 if stats is None else stats.stride(0),
        across,
        across * down,
        steps,
        K // BK,
    )
    arriving, leaving = _STAGED[epilogue](min(tokens, STAGING) // part)
    options = {
        "STAGES": STAGES[tokens],
        "ARRIVING": arriving,
        "LEAVING": leaving,
        "KIND": epilogue,
        "FOLD": stats is not None,
        "AHEAD": stats is not None and steps <= SHORT,
        "HAS_BIAS": bias is not None,
        "TWO": x2 is not None,
        "TRANSPOSED": transposed,
        "SUMS": sums is not None,
        "SCALED": False,
        "PAIRED": False,
        "WIDE": True,
        "NARROW": False,
        "num_warps": 4,
        "maxnreg": 168,
    }
    return args, options, across * down, Product(out, second, partial)


class Hopper(Core):
    """The core for sm_90. Gradients of weights and inputs are the table's choice between it and cuBLAS."""

    def product(self, epilogue: str, x: Tensor, linear: Linear, **more) -> Product:
        features, programs = linear.weight.shape[1 if more.get("transposed") else 0], multiprocessors(x.device)
        tile = FEW
        if cdiv(features, 2 * ROWS) * cdiv(x.shape[0], TOKENS) >= programs:
            tile = {"part": tuning.choice(x.device, CASES[epilogue], x.shape[1])["part"]}
        args, options, tiles, made = arguments(epilogue, x, linear, **more, **tile)
        launch.run(x.device, gemm_kernel, (min(tiles, programs),), args, options)
        return made

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        if not tuning.choice(dy.device, "input_gradient", f"{weight.shape[0]}x{weight.shape[1]}")["ours"]:
            return super().input_gradient(dy, weight)
        return self.product("plain", dy, Linear(weight), transposed=True).out

    def weight_gradient(
        self, dy: Tensor, x: Tensor, *, bias: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not tuning.choice(dy.device, "weight_gradient", f"{dy.shape[1]}x{x.shape[1]}")["ours"]:
            return super().weight_gradient(dy, x, bias=bias, out=out)
        out = dy.new_empty(dy.shape[1], x.shape[1]) if out is None else out
        return out, sm90_weight_gradient.weight_gradient(dy, x, out, bias)


core = Hopper()
