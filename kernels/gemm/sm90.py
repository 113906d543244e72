"""The GEMM core for sm_90: which tiles a product takes, and the launch of `sm90_kernel` for them."""

import functools

import torch
from torch import Tensor

from uvit_fast.kernels.gemm import sm90_weight_gradient
from uvit_fast.kernels.gemm.contract import CASES, Call, Core, Product, results
from uvit_fast.kernels.gemm.sm90_epilogues import How
from uvit_fast.kernels.gemm.sm90_kernel import gemm_kernel
from uvit_fast.kernels.layernorm.sums import CHUNK, WIDEST, Summed
from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.runtime import launch, once, tuning
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

ROWS, TOKENS = 64, 256  # features per consumer, tokens per tile
assert ROWS == CHUNK, "a consumer's features are those whose sums are taken together"
STAGES = {TOKENS: 4, 128: 5, 64: 8}
STAGING = 128  # tokens that a consumer's staging buffers hold together
SHORT = 12  # steps of K, up to which asking for a tile's statistics ahead measured faster
FEW = {"tokens": 64, "part": 32}  # a tile where tokens are few, and the table does not know better
FORWARD = ("plain", "residual", "gelu")  # epilogues whose tiles may have a tail, or halves of K

# Staging buffers of a consumer where so many fit: for what arrives, and for each result that leaves.
_STAGED = {
    "plain": lambda buffers: (0, buffers),
    "gelu": lambda buffers: (0, buffers),
    "gelu_save": lambda buffers: (0, buffers // 2),
    "residual": lambda buffers: (buffers, 0),  # the result leaves from where the residual arrived
    "gelu_backward": lambda buffers: (2, 1),
}


def arguments(
    call: Call,
    made: Product | None = None,
    *,
    wide: bool = True,
    narrow: Tensor | None = None,
    tokens: int = TOKENS,
    part: int = 64,
    pairs: int = 1,
    stages: int = 0,
    shares: int = 1,
    at_once: int = 132,
    tail: int = 0,
    staging: int = 0,
    halves: bool = False,
    early: int = 0,
) -> tuple[tuple, dict, int, Product]:
    """Return the kernel's arguments, its launch options, the number of programs, and the results.

    Args:
        call: of operands of 16 bits, or of e4m3, whose linear layer has `Quantised.rows` as its bias.
        made: memory for the results; default: new.
        wide: whether out is written; narrow: (M, N) e4m3, memory for the result once more.
        tokens, part: of a tile, and of a part of it in the epilogue.
        pairs: of consumers, 1 or 2, which take a program's tiles in turns; 2 of e4m3, without shares, a tail or halves.
        stages: of the ring; default: `STAGES`.
        shares: programs for each tile, of which all together share all tiles' steps of K.
        at_once: programs that run at the same time.
        tail: tokens that a tile has beside, 8, 32 or 64: 258 = 256 + 2, 2 * 129 = 128 + 1, ... then fill whole tiles,
            and there are tiles between those whose tokens are a power of two.
        staging: tokens that a consumer's staging buffers hold together; default: `STAGING`.
        halves: a tile has 64 features, and each consumer half of K; without shares or a tail.
        early: steps of K whose weights the kernel asks for before the one before it has ended (`runtime.hopper`): no
            kernel under way writes the weight; at most those of the ring; 0: it begins after that one.
    """
    epilogue, x, (w, bias), x2, stats, side, _, sums, transposed = call
    (M, K), N, BK, scaled = x.shape, call.features, 128 // x.itemsize, x.itemsize == 1
    span, both, paired = tokens + tail, 2 if halves else 1, scaled and epilogue == "gelu"
    across, down = cdiv(N, ROWS if halves else 2 * ROWS), cdiv(M, span)
    assert not halves or epilogue in FORWARD and not tail and shares == 1
    assert (not tail or epilogue in FORWARD) and span <= WIDEST
    out, second, partial = made = made or results(call, down)
    sent, rows = (out.view(torch.int16), ROWS // 2) if paired else (out, ROWS)
    out_box = descriptor(sent, part, rows)
    x_box = descriptor(x, tokens, BK)
    steps1, steps2 = cdiv(K, BK), 0 if x2 is None else cdiv(x2.shape[1], BK)
    steps, tiles = cdiv(steps1 + steps2, both), across * down
    programs = tiles if halves else min(tiles * shares, at_once)
    shared, arrivals, most = out, out, sharers(tiles, steps, programs) if shares > 1 else 1
    if most > 1:
        shared = x.new_empty(2 * programs, 2, ROWS * span, dtype=ACCUMULATE)
        arrivals = once.counters(x.device, 2 * tiles)
    summed = isinstance(stats, Summed)
    args = (
        descriptor(w, BK, ROWS) if transposed else descriptor(w, ROWS, BK),
        x_box,
        x_box if x2 is None else descriptor(x2, tokens, BK),
        out_box,
        out_box if second is out else descriptor(second, part, ROWS),
        out_box if side is None or side is out else descriptor(side, part, ROWS),
        descriptor(x, tail, BK) if tail else None,
        descriptor(x if x2 is None else x2, tail, BK) if tail else None,
        descriptor(sent, tail, rows) if tail else None,
        descriptor(sent if side is None else side, tail, rows) if tail else None,
        out if bias is None else bias,
        out if stats is None else stats.sums if summed else stats,
        out if narrow is None else narrow,
        partial,
        partial if sums is None else sums,
        shared,
        arrivals,
        M,
        N,
        0 if stats is None or summed else stats.stride(0),
        across,
        tiles,
        steps,
        steps1,
        stats.eps if summed else 0.0,
    )
    arriving, leaving = _STAGED[epilogue](min(tokens // both, staging or STAGING) // part)
    how = How(
        KIND=epilogue,
        STAGES=stages or STAGES[tokens],
        LEAVING=leaving,
        ARRIVING=arriving,
        FOLD="" if stats is None else "sums" if summed else "stats",
        CHUNKS=K // CHUNK if summed else 1,
        AHEAD=stats is not None and not summed and steps <= SHORT,
        HAS_BIAS=bias is not None,
        SCALED=scaled,
        TWO=x2 is not None,
        TRANSPOSED=transposed,
        SUMS=sums is not None,
        PAIRED=paired,
        WIDE=wide,
        NARROW=narrow is not None and not paired,
        MOST=most,
        PAIRS=pairs,
        HALVES=halves,
        EARLY=min(early, stages or STAGES[tokens]),
    )
    options = {"HOW": how, "num_warps": 4, "maxnreg": 168 if pairs == 1 else 96}
    return args, options | {"launch_pdl": True} if early else options, programs, made


@functools.cache
def sharers(tiles: int, steps: int, programs: int) -> int:
    """Return the most programs that share a tile, rounded up to an even number beyond 4."""
    total = tiles * steps
    assert programs <= total, "a program has a step to do"
    first = [((t * steps + 1) * programs - 1) // total for t in range(tiles)]
    last = [((t + 1) * steps * programs - 1) // total for t in range(tiles)]
    most = max(b - a + 1 for a, b in zip(first, last))
    return most + (most > 4) * most % 2  # fewer kernels to compile


def few(case: str, x: Tensor, weight: Tensor) -> dict:
    """Return the tuned choices of `arguments` for a product of few tokens, x (M, K or less) and weight (N, K); {} if
    none. `case` is of `tuning.FEW`.
    """
    chosen = dict(tuning.few(x.device, case, *weight.shape, x.shape[0]))
    chosen.pop("sums", None)
    if chosen.get("early") and not once.met(weight):
        chosen["early"] = 0
    return chosen


def fills(x: Tensor, N: int) -> bool:
    """Return whether the widest tiles of a result (M, N) of x (M, K) leave no multiprocessor idle."""
    return cdiv(N, 2 * ROWS) * cdiv(x.shape[0], TOKENS) >= multiprocessors(x.device)


class Hopper(Core):
    """The core for sm_90. For weight and input gradients the table chooses between it and cuBLAS."""

    def takes_sums(self, x: Tensor, weight: Tensor) -> bool:
        return tuning.few(x.device, "few", *weight.shape, x.shape[0]).get("sums", False)

    def product(self, call: Call) -> Product:
        x, chosen = call.x, {}
        if call.epilogue in FORWARD and not call.transposed:
            chosen = few("few", x, call.linear.weight)
        if not chosen and fills(x, call.features):
            chosen = {"part": tuning.choice(x.device, CASES[call.epilogue], x.shape[1])["part"]}
        args, options, programs, made = arguments(call, **chosen or FEW, at_once=multiprocessors(x.device))
        launch.run(x.device, gemm_kernel, (programs,), args, options)
        return made

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        if not tuning.choice(dy.device, "input_gradient", f"{weight.shape[0]}x{weight.shape[1]}")["ours"]:
            return super().input_gradient(dy, weight)
        return self.product(Call("plain", dy, Linear(weight), transposed=True)).out

    def weight_gradient(
        self, dy: Tensor, x: Tensor, *, bias: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not tuning.choice(dy.device, "weight_gradient", f"{dy.shape[1]}x{x.shape[1]}")["ours"]:
            return super().weight_gradient(dy, x, bias=bias, out=out)
        out = dy.new_empty(dy.shape[1], x.shape[1]) if out is None else out
        return out, sm90_weight_gradient.weight_gradient(dy, x, out, bias)


core = Hopper()
