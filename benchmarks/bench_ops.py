"""How fast are the fused ops? Each against its reference, eager and compiled, and against the bare GEMMs of cuBLAS.

    python -m benchmarks.bench_ops --dims 512 768 1024
    python -m benchmarks.bench_ops --dims 1152 --providers ours-loop ours-fp8

Milliseconds of one forward (as in inference) or one backward, for 33024 tokens (128 images of 258), in bf16. The GPU is
kept busy while the calls are queued, so that a launch from Python costs no op anything: in a captured sampler or a
training step of H/2 it does not either. `ours-loop` is `ours` as in a sampling loop, its weights folded beforehand;
`ours-fp8` beside it the same with e4m3 operands, a LayerNorm's statistics before it and all that the next op reads
after it, in bf16, e4m3 or both. `ours-sm80` are the kernels of an A100 on this card; `ours-plain` and `ours-sm80-plain`
the bare products by our own cores, which show what prologues and epilogues cost on either. `block` is a whole block
with a long skip, attention included, for 128 images of 258 tokens; `block:host` is the time that Python takes to queue
one, whatever the GPU does.
"""

import argparse
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.common import RESULTS, Rows, need_gpu
from uvit_fast.kernels import gemm
from uvit_fast.kernels.gemm import sm90_fp8
from uvit_fast.kernels.gemm.fp8 import Made
from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops import fp8_block, linear_residual, ln_linear, ln_mlp, skip_linear
from uvit_fast.kernels.quantise import narrow
from uvit_fast.kernels.runtime.device import forced
from uvit_fast.kernels.tools.tune import times
from uvit_fast.model import ops
from uvit_fast.model.uvit import Block
from uvit_fast.runtime.errors import in_one_line

TOKENS, BATCH = 33024, 128
OURS = ("ours", "ours-loop", "ours-fp8")
PROVIDERS = (*OURS, "eager", "compiled", "cublas", "ours-plain", "ours-sm80", "ours-sm80-plain")
QUEUE_CYCLES = 60_000_000  # how long the GPU sleeps while Python queues the calls: about 30 ms


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def cases(D: int) -> dict:
    """Return op -> (its module, arguments, the GEMMs of its forward and its backward as (M, N, K))."""
    x, skip, norm = random(TOKENS, D), random(TOKENS, D), Norm(1 + 0.1 * random(D), 0.1 * random(D))

    def linear(N: int, K: int, bias: bool = True) -> Linear:
        return Linear(random(N, K) * D**-0.5, random(N) if bias else None)

    def gemms(N: int, K: int):
        return [(TOKENS, N, K)], [(TOKENS, K, N), (N, K, TOKENS)]

    up, down = gemms(4 * D, D), gemms(D, 4 * D)
    mlp = (x, norm, linear(4 * D, D), linear(D, 4 * D))
    return {
        "ln_linear": (ln_linear, (x, norm, linear(3 * D, D, bias=False)), gemms(3 * D, D)),
        "ln_mlp": (ln_mlp, mlp, (up[0] + down[0], up[1] + down[1])),
        "skip_linear": (skip_linear, (x, skip, linear(D, 2 * D)), gemms(D, 2 * D)),
        "linear_residual": (linear_residual, (x, linear(D, D), skip), gemms(D, D)),
    }


def cublas(shapes: list[tuple[int, int, int]]):
    """Return the bare products, with operands laid out as the op's: weights (N, K) in the forward, tokens contracted in
    the backward.
    """
    pairs = [
        (random(K, M).t(), random(K, N)) if K == TOKENS else (random(M, K), random(N, K).t()) for M, N, K in shapes
    ]
    return lambda: [a @ b for a, b in pairs]


def plain_products(shapes: list[tuple[int, int, int]]):
    """Return the bare products of a forward by our own core, without prologue or epilogue."""
    pairs = [(random(M, K), Linear(random(N, K))) for M, N, K in shapes]
    return lambda: [gemm.core(a.device).linear(a, b) for a, b in pairs]


def in_fp8(D: int) -> dict[str, Callable[[], object]]:
    """Return op -> the same with e4m3 operands, as the previous kernels leave them, up to all that the next one reads;
    {} on other GPUs.
    """
    if fp8_block.why_not(D, heads(D), 4 * D, torch.device("cuda")):
        return {}
    x, side, norm = random(TOKENS, D), random(TOKENS, D), Norm(1 + 0.1 * random(D), 0.1 * random(D))
    x8, skip8 = narrow(x), narrow(random(TOKENS, D))
    shapes = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (4 * D, D), "fc2": (D, 4 * D), "skip": (D, 2 * D)}
    qkv, proj, fc1, fc2, skip = (Linear(random(*shape) * D**-0.5, random(shape[0])) for shape in shapes.values())
    layers = fp8_block.derive(norm, qkv._replace(bias=None), proj, norm, fc1, fc2, skip, heads(D))
    leaving = {"side": side, "narrow": True, "sums": True}
    product = sm90_fp8.product

    def mlp() -> Made:
        h = product("gelu", x8, layers.fc1, stats=fold.statistics(x), wide=False).narrow
        return product("residual", h, layers.fc2, **leaving)

    def block() -> fp8_block.Stream:
        h = fp8_block.joined(fp8_block.Stream(None, x8), skip8, layers)
        return fp8_block.through_mlp(fp8_block.attended(h, layers, BATCH, heads(D)), layers)

    return {
        "ln_linear": lambda: product("plain", x8, layers.qkv, stats=fold.statistics(x)),
        "ln_mlp": mlp,
        "skip_linear": lambda: product("plain", x8, layers.skip, x2=skip8, narrow=True, sums=True),
        "linear_residual": lambda: product("residual", x8, layers.proj, **leaving),
        "block": block,
    }


def heads(D: int) -> int:
    return D // 72 if D % 72 == 0 else D // 64


class Timings:
    """The rows of one width D, of the providers that were asked for."""

    def __init__(self, rows: Rows, D: int, asked: Collection[str]):
        self.rows, self.D, self.asked = rows, D, asked
        self.narrowed = in_fp8(D) if "ours-fp8" in asked else {}

    def add(self, case: str, provider: str, make: Callable[..., Callable], *given: Any, **how: Any) -> None:
        """Add a row of the GPU's time of what make(*given) returns; `how` is as in `tune.times`."""
        if provider in self.asked:
            self.put(case, provider, times(make(*given), **how))

    def put(self, case: str, provider: str, values: list[float]) -> None:
        dtype = "fp8" if provider == "ours-fp8" else "bf16"
        self.rows.add(f"{case}:{self.D}", provider, values, metric="time", unit="ms", dtype=dtype, batch=BATCH)

    def loop(self, name: str, ours: Callable[[], object]) -> None:
        """Time a forward as in a sampling loop, which derives nothing from the weights again: in bf16, and in FP8 if it
        runs.
        """
        with torch.no_grad(), ops.fixed_weights():
            self.add(f"{name}:fwd", "ours-loop", partial, ours)
            if name in self.narrowed:
                self.add(f"{name}:fwd", "ours-fp8", partial, self.narrowed[name])


def bench(found: Timings, names: list[str]) -> None:
    for name, (module, args, (forward, backward)) in cases(found.D).items():
        if name not in names:
            continue
        add, ours = found.add, partial(getattr(module, name), *args)
        compiled = torch.compile(module.reference, dynamic=False)
        providers = {"ours": getattr(module, name), "eager": module.reference, "compiled": compiled}
        with torch.no_grad():
            for provider, f in providers.items():
                add(f"{name}:fwd", provider, partial, f, *args)
        found.loop(name, ours)
        add(f"{name}:fwd", "cublas", cublas, forward)
        add(f"{name}:fwd", "ours-plain", plain_products, forward)
        with forced(80), torch.no_grad():
            add(f"{name}:fwd", "ours-sm80", partial, ours)
            add(f"{name}:fwd", "ours-sm80-plain", plain_products, forward)
        args = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), args)
        for provider, f in providers.items():
            add(f"{name}:bwd", provider, backward_of, f, args)
        add(f"{name}:bwd", "cublas", cublas, backward)


def backward_of(f: Callable, args: tuple) -> Callable[[], object]:
    """Return the backward of f(*args), to be run repeatedly."""
    leaves, y = [t for t in tree_leaves(args) if isinstance(t, Tensor)], f(*args)
    y = y[0] if isinstance(y, tuple) else y  # without the sums for a LayerNorm that follows
    return partial(torch.autograd.grad, y, leaves, torch.randn_like(y), retain_graph=True)


def bench_block(found: Timings) -> None:
    """Time a whole block: ours, and the published one's ops eager and compiled, all with bf16 weights."""
    D = found.D
    x, skip = (random(BATCH, TOKENS // BATCH, D).requires_grad_() for _ in range(2))
    for provider, timed in {"ours": OURS, "eager": ["eager"], "compiled": ["compiled"]}.items():
        if not {*timed} & {*found.asked}:
            continue
        how = ("auto", "auto") if provider == "ours" else ("sdpa", "reference")
        block = Block(D, heads(D), 4.0, True, *how).to("cuda", torch.bfloat16)
        f = torch.compile(block, dynamic=False) if provider == "compiled" else block
        dy = torch.randn_like(f(x, skip))

        leaves = (x, skip, *block.parameters())

        def step(f=f, leaves=leaves, dy=dy) -> None:
            torch.autograd.grad(f(x, skip), leaves, dy)

        forward = partial(f, x, skip)
        with torch.no_grad():
            found.add("block:fwd", provider, partial, forward)
        if provider == "ours":
            found.loop("block", forward)
        found.add("block:fwdbwd", provider, partial, step, repeats=10, cycles=6 * QUEUE_CYCLES)
        if provider in found.asked:
            found.put("block:host", provider, [host_milliseconds(step) for _ in range(10)])


def host_milliseconds(f) -> float:
    """Return the time that Python takes to queue one call."""
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUE_CYCLES)
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e3


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 768, 1024, 1152], help="widths D of the model")
    names = ["ln_linear", "ln_mlp", "skip_linear", "linear_residual", "block"]
    parser.add_argument("--ops", nargs="+", choices=names, default=names)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--out", default=RESULTS, help="folder of ops.csv")
    given = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # a compiled backward runs repeatedly on one forward
    rows = Rows("ops", given.out)
    rows.ceilings()
    for D in given.dims:
        torch._dynamo.reset()
        found = Timings(rows, D, given.providers)
        bench(found, given.ops)
        if "block" in given.ops:
            bench_block(found)
        print(rows.write(), flush=True)  # after each width: an interrupted run has measured something


if __name__ == "__main__":
    main()
