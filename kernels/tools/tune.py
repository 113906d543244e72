"""Measure the choices of the tuning tables on this GPU and write its table: `uvit-fast tune`.

Each case is run as the ops run it, with every candidate that compiles, in turns: a GPU's clock moves by more than
candidates differ. The table's current choice stays unless another beats it by more than the noise.
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.gemm import fp8, sm90_fp8
from uvit_fast.kernels.gemm.contract import CASES
from uvit_fast.kernels.layernorm import fold, sums
from uvit_fast.kernels.layernorm.backward import backward
from uvit_fast.kernels.layers import Linear, Norm, Quantised
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.kernels.quantise import narrow
from uvit_fast.kernels.runtime import once, reduce, tuning
from uvit_fast.kernels.runtime.device import architecture

TOKENS = 33024  # 128 images of 258 tokens
FEW = [258 * images for images in (1, 2, 4, 8, 16, 32)]
COPIES = 8  # of a weight in products of few tokens: more than L2 holds, as in a network
NOISE = 0.015  # share by which a candidate must win
_OURS = [{"ours": True}, {"ours": False}]
_FORMS = [  # of tiles for few tokens: tokens, tokens beside, stages, tokens of the staging buffers
    (64, 0, 8, 128),
    (64, 8, 7, 128),
    (64, 32, 6, 128),
    (128, 0, 5, 128),
    (128, 8, 5, 128),
    (128, 32, 4, 128),
    (128, 64, 4, 64),
    (256, 0, 4, 128),
    (256, 8, 4, 64),
]
_HALVES = [  # of such tiles with halves of K: tokens, stages, tokens of a part
    (32, 8, 16),
    (64, 6, 32),
    (128, 4, 32),
]


def _grid(**values: list) -> list[dict]:
    return [dict(zip(values, choice)) for choice in itertools.product(*values.values())]


def candidates(arch: int) -> dict[str, list[dict]]:
    """Return case -> the choices to try on an architecture."""
    if arch == 90:
        gemm = _grid(part=[32, 64])
        gelu_backward = _grid(part=[32])  # in parts of 64 its buffers would not fit
        few = [
            {"tokens": tokens, "tail": tail, "stages": stages, "staging": staging, "part": 32, **more}
            for tokens, tail, stages, staging in _FORMS
            for more in _grid(shares=[1, 2, 3], sums=[True, False])
        ]
        few += [
            {"tokens": tokens, "stages": stages, "part": part, "halves": True, "sums": sums}
            for tokens, stages, part in _HALVES
            for sums in (True, False)
        ]
        narrow = _grid(tokens=[256], part=[32, 64], pairs=[1]) + _grid(tokens=[128], part=[32, 64], pairs=[2])
        fp8_few = few + _grid(tokens=[128], part=[32], pairs=[2], sums=[True, False])
        products = {"input_gradient": _OURS, "weight_gradient": _OURS, "few": few, "fp8_few": fp8_few}
        products |= dict.fromkeys(fp8.CASES.values(), narrow)
    else:
        gemm = _grid(tile=[[128, 128, 32], [128, 64, 64], [128, 256, 32]], group=[8], warps=[4, 8], stages=[3, 4])
        gelu_backward, products = gemm, {}
    return {
        "prepare": _grid(rows=[1, 2, 4], warps=[1, 2, 4]),
        "ln_backward": _grid(programs=[264, 396, 528, 792, 1056], warps=[1, 2, 4]),
        "column_sums": _grid(programs=[66, 132], rows=[8, 32], block=[64, 512], warps=[4]),
        **{case: gelu_backward if case == "gemm_gelu_backward" else gemm for case in CASES.values()},
        **products,
    }


def cases(D: int, device: torch.device) -> Iterator[tuple[str, str, Callable]]:
    """Yield the cases of a block of width D, as (case, width, a call that runs it once)."""
    core, random = gemm.core(device), partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, dy, wide, h = random(TOKENS, D), random(TOKENS, D), random(TOKENS, 3 * D), random(TOKENS, 4 * D)
    norm, b = Norm(random(D), random(D)), random(D)
    qkv, proj, up, down = (random(n, k) * k**-0.5 for n, k in ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D)))
    fc1 = Linear(up, random(4 * D))
    folded, narrow = fold.prepare(x, norm, fc1), fold.prepare(x, norm, Linear(qkv))
    written = sums.new(x)

    yield "prepare", str(D), lambda: fold.prepare(x, norm, fc1)
    yield "ln_backward", str(D), lambda: backward(dy, x, folded.stats, *norm[:2], dy)
    yield "column_sums", str(D), lambda: reduce.column_sums(dy)
    yield "gemm", str(D), lambda: core.linear(x, narrow.linear, stats=narrow.stats)
    yield "gemm_residual", str(D), lambda: core.linear(x, Linear(proj, b), residual=dy, sums=written)
    yield "gemm_residual", str(4 * D), lambda: core.linear(h, Linear(down, b), residual=dy, sums=written)
    yield "gemm_gelu", str(D), lambda: core.linear_gelu(x, folded.linear, stats=folded.stats, save=False)
    yield "gemm_gelu_save", str(D), lambda: core.linear_gelu(x, folded.linear, stats=folded.stats, save=True)
    yield "gemm_gelu_backward", str(D), lambda: core.linear_gelu_backward(dy, down, h)
    for gradient, weight in ((wide, qkv), (h, up), (dy, proj)):
        size = f"{weight.shape[0]}x{weight.shape[1]}"
        yield "input_gradient", size, lambda g=gradient, w=weight: core.input_gradient(g, w)
    for gradient, source, bias in ((wide, x, False), (h, x, False), (dy, h, False), (dy, x, True)):
        size = f"{gradient.shape[1]}x{source.shape[1]}"
        yield "weight_gradient", size, lambda g=gradient, s=source, b=bias: core.weight_gradient(g, s, bias=b)

    for M in FEW:
        yield from _few(D, M, random)


def _few(D: int, M: int, random: Callable[..., Tensor]) -> Iterator[tuple[str, str, Callable]]:
    """Yield the products of M tokens in a block whose weights are folded already, with the launches of their ops."""
    x, y, h, norm = random(M, D), random(M, D), random(M, 4 * D), Norm(random(D), random(D))
    left = torch.zeros(D // 64, 2, M, device=x.device)

    def layers(N: int, K: int) -> Iterator[Linear]:
        return itertools.cycle([Linear(random(N, K) * K**-0.5, random(N)) for _ in range(COPIES)])

    core = gemm.core(x.device)
    qkv, proj, up, down, skip = (layers(n * D, k * D) for n, k in ((3, 1), (1, 1), (4, 1), (1, 4), (1, 2)))

    def folded(linear: Linear) -> Tensor:
        made = fold.prepare(x, norm, linear, left, measured=not core.takes_sums(x, linear.weight))
        if linear.weight.shape[0] == 4 * D:
            return core.linear_gelu(x, made.linear, stats=made.stats, save=False)[0]
        return core.linear(x, made.linear, stats=made.stats)

    calls = {
        (3 * D, D): lambda: folded(next(qkv)),
        (D, D): lambda: core.linear(x, next(proj), residual=y, sums=left),
        (4 * D, D): lambda: folded(next(up)),
        (D, 4 * D): lambda: core.linear(h, next(down), residual=y, sums=left),
        (D, 2 * D): lambda: core.linear(x, next(skip), x2=y, sums=left),
    }
    yield from _of_met("few", M, calls)


def _of_met(case: str, M: int, calls: dict[tuple[int, int], Callable]) -> Iterator[tuple[str, str, Callable]]:
    """Yield products of M tokens, by their weights' shape, as in a loop that has met (and folded) its weights."""
    kept: dict[tuple, Any] = {}

    def within(call: Callable) -> Any:
        with once.stretch(kept):
            return call()

    for (N, K), call in calls.items():
        for _ in range(COPIES):
            within(call)
        yield case, f"{N}x{K}:{M}", partial(within, call)


def fp8_cases(D: int, device: torch.device) -> Iterator[tuple[str, str, Callable]]:
    """Yield the cases of a block of width D with e4m3 products, as `cases` does."""
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, norm = random(TOKENS, D), Norm(random(D), random(D))
    qkv, proj, fc1, fc2, skip = (
        Linear(random(n, k) * k**-0.5, random(n)) for n, k in ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (D, 2 * D))
    )
    layers = fp8_block.derive(norm, qkv, proj, norm, fc1, fc2, skip, D // 64)
    x8, h8, stats = narrow(x), narrow(random(TOKENS, 4 * D)), fold.statistics(x)
    both = {"narrow": True, "sums": True}

    yield fp8.CASES["plain"], str(D), lambda: sm90_fp8.product("plain", x8, layers.qkv, stats=stats)
    yield fp8.CASES["two_sources"], str(D), lambda: sm90_fp8.product("plain", x8, layers.skip, x2=x8, **both)
    yield fp8.CASES["residual"], str(D), lambda: sm90_fp8.product("residual", x8, layers.proj, side=x, **both)
    yield fp8.CASES["residual"], str(4 * D), lambda: sm90_fp8.product("residual", h8, layers.fc2, side=x, **both)
    yield fp8.CASES["gelu"], str(D), lambda: sm90_fp8.product("gelu", x8, layers.fc1, stats=stats, wide=False)

    for M in FEW:
        yield from _fp8_few(M, layers, random)


def _fp8_few(M: int, layers: fp8_block.Layers, random: Callable[..., Tensor]) -> Iterator[tuple[str, str, Callable]]:
    """Yield the products of M tokens in a block with e4m3 products, with the launches of its parts."""
    D, H = layers.fc2.weight.shape
    x, left = random(M, D), torch.zeros(D // 64, 2, M, device=layers.qkv.weight.device)
    x8, h8, product, both = narrow(x), narrow(random(M, H)), sm90_fp8.product, {"narrow": True, "sums": True}
    stream = fp8_block.Stream(x, x8, left)
    qkv, proj, fc1, fc2, skip = (
        itertools.cycle([layer._replace(weight=layer.weight.clone()) for _ in range(COPIES)]) for layer in layers
    )

    def folded(epilogue: str, layer: Quantised) -> fp8.Made:
        return product(epilogue, x8, layer, stats=fp8_block.measured(stream, layer)[1], wide=epilogue != "gelu")

    calls = [
        (layers.qkv, lambda: folded("plain", next(qkv))),
        (layers.proj, lambda: product("residual", x8, next(proj), side=x, **both)),
        (layers.fc1, lambda: folded("gelu", next(fc1))),
        (layers.fc2, lambda: product("residual", h8, next(fc2), side=x, **both)),
        (layers.skip, lambda: product("plain", x8, next(skip), x2=x8, **both)),
    ]
    yield from _of_met("fp8_few", M, {tuple(layer.weight.shape): call for layer, call in calls})


def _timed(calls: list[Callable], cycles: int) -> list[float]:
    """Return each call's milliseconds on the GPU, back to back; it sleeps for `cycles` while Python queues them."""
    torch.cuda._sleep(cycles)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:]):
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def times(f: Callable, repeats: int = 25, cycles: int = 60_000_000) -> list[float]:
    """Return the milliseconds of `repeats` calls on the GPU, back to back, after three more."""
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    return _timed([f] * repeats, cycles)


def milliseconds(calls: list[Callable]) -> list[float]:
    """Return each call's median on the GPU, of nine rounds in turns, before each of which it sleeps for 2 ms a call."""
    turns = [_timed(calls, 3_000_000 * len(calls)) for _ in range(9)]
    return [statistics.median(taken) for taken in zip(*turns)]


def tune(
    dims: list[int],
    device: torch.device,
    report: Callable[[str], None] = print,
    only: list[str] | None = None,
    width_done: Callable[[int], None] = lambda D: None,
) -> dict[str, dict]:
    """Measure the table of the GPU's architecture.

    Args:
        dims: widths D. A width in the old table that is not among them takes its case's commonest choice.
        only: cases to measure; the others stay as they are. Default: all.
        report: called with a line for each case: its choice, and the milliseconds before and after.
        width_done: called after each width.

    Returns:
        What `tuning.choice` reads: "default"; case -> its commonest choice; case:width -> where a width's differs.
    """
    arch = architecture(device)
    table, tried, found = tuning.table(arch), candidates(arch), {}
    tried = {case: choices for case, choices in tried.items() if not only or case in only}
    kept = {key: choice for key, choice in table.items() if key.partition(":")[0] not in tried}
    for D in dims:
        for case, width, f in itertools.chain(cases(D, device), fp8_cases(D, device) if arch == 90 else ()):
            if case not in tried:
                continue
            entry = f"{case}:{width}"
            before = tuning.choice(device, case, width)
            before, always = {name: before[name] for name in tried[case][0]}, {}
            if case in tuning.FEW:  # without an entry it follows a rule, not a default
                before = table.get(entry, {})
                always = {name: v for name, v in before.items() if name == "early"}  # its gain is in whole evaluations
            choices, calls = [before, *(choice | always for choice in tried[case])], {}
            for i, choice in enumerate(choices):
                call = partial(_run_with, table, entry, choice, f)
                try:
                    call()
                    calls[i] = call
                except Exception as error:  # whatever this compiler or GPU rejects is no candidate
                    report(f"{entry}: {choice} cannot run: {str(error).splitlines()[0][:80]}")
            times = [math.inf] * len(choices)
            for i, time in zip(calls, milliseconds([*calls.values()])):
                times[i] = time
            best = min(times)
            choice = before if best > (1 - NOISE) * times[0] else choices[times.index(best)]
            table[entry] = choice
            found.setdefault(case, {})[width] = choice
            report(f"{entry:32s} {times[0]:8.4f} -> {best:8.4f} ms  {json.dumps(choice)}")
        width_done(D)
    return kept | compact(table["default"], found)


def _run_with(table: dict, entry: str, choice: dict, f: Callable) -> Any:
    table[entry] = choice
    return f()


def compact(default: dict, found: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Return case -> width -> choice as a table with each case's commonest choice as its own, except for few tokens."""
    table = {"default": default}
    for case, widths in found.items():
        if case in tuning.FEW:
            table |= {f"{case}:{size}": choice for size, choice in widths.items()}
            continue
        common = max(widths.values(), key=lambda choice: sum(other == choice for other in widths.values()))
        table[case] = common
        table |= {f"{case}:{width}": choice for width, choice in widths.items() if choice != common}
    return table


def write(table: dict[str, dict], path: Path) -> None:
    """Write a table as JSON, a case per line: "default" first, then by name."""
    names = ["default", *sorted(table.keys() - {"default"})]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in names)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}")  # a table cut short would end every process that reads it
    whole.write_text("{\n" + lines + "\n}\n")
    whole.replace(path)
