"""Has anything become slower? Compare cases with benchmarks/baselines/<gpu>.json, in ratios that hold on a slower card.

    python -m benchmarks.regression            # compare with the baseline of this GPU; exit code 1 if a case lost
    python -m benchmarks.regression --write    # make the current measurements the baseline

Each round times a bf16 matrix product, a copy and the case, one right after the other. The expected time of a case is
its baseline's, scaled by how long product and copy take now against then, in the case's own shares. A neighbour only
ever slows things, and not all the time: every time is a low quantile over its rounds, and a loss must show in each of
`ATTEMPTS` measurements.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import bench_ops, models
from uvit_fast import build_sampler
from uvit_fast.kernels.ops import attention
from uvit_fast.sampling.captured import GraphSampler

FOLDER = Path(__file__).parent / "baselines"
LIMIT = 1.03  # times the expected time: below a loss of 5%, above the spread of repeats
QUANTILE = 0.25
ATTEMPTS = 3
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A timed case.

    Args:
        make: allocates and warms up; returns what a round calls.
        products: share of its time spent in matrix products; the rest moves memory.
        calls: per round, such that it takes at least a millisecond.
        rounds: per measurement.
    """

    make: Callable[[], Run]
    products: float
    calls: int = 4
    rounds: int = 40


@dataclass(frozen=True)
class Times:
    """Milliseconds of the matrix product, of the copy, and of one call of the case."""

    product: float
    copy: float
    case: float


def expected(was: Times, now: Times, products: float) -> float:
    """Return the milliseconds that the case would take now if nothing about it had changed."""
    return was.case * (products * now.product / was.product + (1 - products) * now.copy / was.copy)


def summary(rounds: list[tuple[float, float, float]]) -> Times:
    """Return the low quantile of each column of (product, copy, case) in milliseconds."""
    columns = zip(*rounds)
    return Times(*(sorted(column)[int(QUANTILE * len(rounds))] for column in columns))


@dataclass(frozen=True)
class Verdict:
    """ratio: measured over expected, of the best attempt; lost: a sentence if every attempt was beyond `LIMIT`."""

    now: Times
    ratio: float
    lost: str | None


def compare(name: str, was: Times, products: float, measure: Callable[[], Times]) -> Verdict:
    """Measure until an attempt is within `LIMIT` of the expected time, at most `ATTEMPTS` times."""
    found: list[tuple[float, Times]] = []
    while len(found) < ATTEMPTS and all(ratio > LIMIT for ratio, _ in found):
        now = measure()
        found.append((now.case / expected(was, now, products), now))
    ratio, now = min(found, key=lambda pair: pair[0])
    lost = (
        f"{name}: was {was.case:.4g} ms, now {now.case:.4g} ms, {ratio - 1:+.1%} beyond what "
        "this card's matrix product "
        f"({now.product / was.product - 1:+.1%}) and copy ({now.copy / was.copy - 1:+.1%}) explain"
    )
    return Verdict(now, ratio, lost if ratio > LIMIT else None)


class Yard:
    """The matrix product and the copy with which every round begins."""

    def __init__(self, device: str = "cuda", side: int = 8192, elements: int = 2**28):
        self.device = device
        self.a, self.b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.source = torch.zeros(elements, device=device)
        self.target = torch.empty_like(self.source)

    def measure(self, run: Run, calls: int, rounds: int) -> Times:
        """Run rounds of product, copy and case. The first two also keep a GPU busy while Python queues the case."""
        found, marks = [], []
        for _ in range(rounds + 2):
            marks.append([self._mark()])
            for part in (lambda: self.a @ self.b, lambda: self.target.copy_(self.source), partial(_repeat, run, calls)):
                part()
                marks[-1].append(self._mark())
        if self.device == "cuda":
            torch.cuda.synchronize()
        for row in marks[2:]:  # the first two are a warm-up
            product, copy, case = (_elapsed(a, b) for a, b in zip(row[:-1], row[1:]))
            found.append((product, copy, case / calls))
        return summary(found)

    def _mark(self) -> "torch.cuda.Event | float":
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(a: "torch.cuda.Event | float", b: "torch.cuda.Event | float") -> float:
    return (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)


def _repeat(run: Run, calls: int) -> None:
    for _ in range(calls):
        run()


def _op(name: str, backward: bool) -> Run:
    module, args, _ = bench_ops.cases(1152)[name]
    return _with_backward(getattr(module, name), args) if backward else _without_gradients(getattr(module, name), args)


def _attention(backward: bool) -> Run:
    args = (torch.randn(128, 258, 3, 16, 72, device="cuda", dtype=torch.bfloat16),)
    return (_with_backward if backward else _without_gradients)(attention.attention, args)


def _without_gradients(op: Callable, args: tuple) -> Run:
    return torch.no_grad()(partial(op, *args))


def _with_backward(op: Callable, args: tuple) -> Run:
    """Return a run of forward and backward."""
    given = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), args)
    leaves = [t for t in tree_leaves(given) if isinstance(t, Tensor)]

    def output() -> Tensor:
        y = op(*given)
        return y[0] if isinstance(y, tuple) else y  # without the sums for the next LayerNorm

    dout = torch.randn_like(output())
    return lambda: torch.autograd.grad(output(), leaves, dout)


def _network(training: bool) -> Run:
    cfg = models.config("H", "ours")
    net = models.model(cfg, "ours").train(training)
    if not training:
        x, t, y = models.images(cfg, 128)
        return torch.no_grad()(lambda: net(x, t, y=y))
    weights, loss = list(net.parameters()), models.loss(cfg, 128)
    return lambda: torch.autograd.grad(loss(net), weights)


def _plain_call() -> Run:
    cfg = models.config("H", "ours")
    net, (x, t, y) = models.model(cfg, "ours").eval(), models.images(cfg, 8)
    call = torch.no_grad()(lambda: net(x, t, y=y))
    _repeat(call, 3)
    assert len(net.captures) == 1, "a plain call without gradients replays"
    return call


def _sampling() -> Run:
    cfg = models.config("L", "ours")
    graphs = GraphSampler(models.model(cfg, "ours").eval())
    sampler = build_sampler(cfg, 5)
    x, _, y = models.images(cfg, 50)
    return lambda: graphs(sampler, x, {"y": y}, {"y": 1000}, 0.4)


CASES: dict[str, Case] = {
    "ln_linear forward": Case(partial(_op, "ln_linear", False), 0.8),
    "ln_mlp forward": Case(partial(_op, "ln_mlp", False), 0.9),
    "skip_linear forward": Case(partial(_op, "skip_linear", False), 0.8),
    "linear_residual forward": Case(partial(_op, "linear_residual", False), 0.6),
    "attention forward": Case(partial(_attention, False), 0.4),
    "ln_linear forward and backward": Case(partial(_op, "ln_linear", True), 0.7),
    "ln_mlp forward and backward": Case(partial(_op, "ln_mlp", True), 0.8),
    "skip_linear forward and backward": Case(partial(_op, "skip_linear", True), 0.8),
    "linear_residual forward and backward": Case(partial(_op, "linear_residual", True), 0.6),
    "attention forward and backward": Case(partial(_attention, True), 0.4),
    "H/2 forward, batch 128": Case(partial(_network, False), 0.8, calls=1, rounds=12),
    "H/2 forward and backward, batch 128": Case(partial(_network, True), 0.7, calls=1, rounds=12),
    "H/2 plain call, batch 8": Case(_plain_call, 0.5, calls=2, rounds=20),
    "L/2 sampling, captured, 5 guided evaluations of 50": Case(_sampling, 0.8, calls=1, rounds=12),
}


def baseline_path() -> Path:
    return FOLDER / f"{torch.cuda.get_device_name().replace(' ', '_')}.json"


def read_baseline() -> dict[str, Times]:
    """Return the baseline of this GPU, empty if there is none."""
    path = baseline_path()
    return {name: Times(**was) for name, was in json.loads(path.read_text())["cases"].items()} if path.exists() else {}


def measurement(name: str, yard: Yard) -> Callable[[], Times]:
    """Return a function that measures a case, again at each call."""
    case = CASES[name]
    run = case.make()
    _repeat(run, 2)  # compiles, captures
    return lambda: yard.measure(run, case.calls, case.rounds)


def write_baseline(yard: Yard) -> Path:
    """Measure every case and write this GPU's baseline: the middle one of `ATTEMPTS` measurements."""
    import triton

    cases = {}
    for name in CASES:
        measure = measurement(name, yard)
        tried = sorted((measure() for _ in range(ATTEMPTS)), key=lambda times: times.case)
        cases[name] = vars(tried[len(tried) // 2])
        print(f"{name:56s} {cases[name]['case']:9.4g} ms", flush=True)
    path = baseline_path()
    stack = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    path.write_text(json.dumps({**stack, "cases": cases}, indent=1) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the baseline instead of comparing with it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU, got none; without one run python -m benchmarks.guards")
    yard = Yard()
    if args.write:
        print(f"wrote {write_baseline(yard)}")
        return 0
    if not (baseline := read_baseline()):
        parser.error(f"no {baseline_path()}; --write makes it")
    verdicts = []
    for name in CASES:
        if name not in baseline:
            print(
                f"{name:56s} not compared: {baseline_path().name} was written before this case; --write makes it anew"
            )
            continue
        verdict = compare(name, baseline[name], CASES[name].products, measurement(name, yard))
        line = (
            f"{name:56s} was {baseline[name].case:9.4g} ms, now {verdict.now.case:9.4g} ms, ratio {verdict.ratio:.3f}"
        )
        print(line, flush=True)
        verdicts.append(verdict)
    lost = [verdict.lost for verdict in verdicts if verdict.lost]
    print("\n".join([f"median ratio {statistics.median(v.ratio for v in verdicts):.3f}", *lost]))
    return int(bool(lost))


if __name__ == "__main__":
    raise SystemExit(main())
