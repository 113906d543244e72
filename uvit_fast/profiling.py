"""Where the time goes: a training step and a sampling loop under PyTorch's profiler, summed up by families of ops.

A GPU's trace has every kernel with its begin and end; the families share the time in which any ran. Without a GPU it
has the host's ops, each without the ops inside it.
"""

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from uvit_fast.build import build_dataset, build_model, build_objective, build_sampler
from uvit_fast.config import Config
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.runtime.device import pick_device
from uvit_fast.runtime.files import write_table
from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.training.trainer import Trainer

WARM_UP = 3  # steps before the profiled ones: compilation, autotuning, the optimizer's state
OPTIMIZER = "optimizer"  # the range in which the engine's step and the EMA are recorded
# The first match with a kernel's or an op's name counts; without any it is elementwise: norms, activations, sums,
# copies.
FAMILIES = {
    "communication": r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_scatter|broadcast_",
    "optimizer": r"adam|multi_tensor_apply",
    "attention": r"attention|flash|fmha|sdpa|softmax",
    "linear": r"gemm|weight_gradient|^sum_kernel|cutlass|nvjet|xmma|cublas|splitk|conv|linear|addmm|(^|::|_)b?mm"
    r"|mmbackward|matmul",
}
ORDER = ["linear", "attention", "elementwise", "optimizer", "communication", "idle"]
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


class Row(NamedTuple):
    """A family's share of a step.

    Args:
        ms: milliseconds per step. Communication: only while nothing else ran.
        calls: kernels, or the host's ops, per step.
    """

    family: str
    ms: float
    share: float
    calls: float


def family(name: str, in_optimizer: bool = False) -> str:
    """Return the family of a kernel or an op, by its name and whether it ran in the optimizer's range."""
    found = next((kind for kind, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise")
    return "optimizer" if in_optimizer and found != "communication" else found


def breakdown(trace: dict[str, Any], steps: int) -> list[Row]:
    """Break down a trace of `steps` steps by family, in `ORDER`; the rows add up to the time from the first event to
    the last.

    Args:
        trace: the profiler's export, in Chrome's format, times in microseconds.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("dur", 0) > 0]
    kernels = [e for e in events if e.get("cat") in KERNELS]
    ranges = "gpu_user_annotation" if kernels else "user_annotation"
    optimizer = [_interval(e) for e in events if e.get("cat") == ranges and e["name"] == OPTIMIZER]
    ops = [(e, [_interval(e)]) for e in kernels] or _exclusive([e for e in events if e.get("cat") == "cpu_op"])
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ORDER}
    calls = dict.fromkeys(ORDER, 0)
    for event, intervals in ops:
        begin, end = _interval(event)
        kind = family(event["name"], any(a <= begin and end <= b for a, b in optimizer))
        times[kind] += intervals
        calls[kind] += 1
    every = [interval for kind in ORDER for interval in times[kind]]
    if not every:
        return [Row(kind, 0.0, 0.0, 0.0) for kind in ORDER]
    window = max(end for _, end in every) - min(begin for begin, _ in every)
    spent: dict[str, float] = {}
    covered: list[tuple[float, float]] = []
    for kind in ORDER[
        :-1
    ]:  # an instant belongs to the first family that ran then: communication only while no other did
        before = _length(covered)
        covered += times[kind]
        spent[kind] = _length(covered) - before
    spent["idle"] = window - _length(covered)
    return [Row(kind, spent[kind] / 1e3 / steps, spent[kind] / window, calls[kind] / steps) for kind in ORDER]


def _interval(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _length(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _exclusive(ops: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[tuple[float, float]]]]:
    """Return each of the host's ops with the intervals in which none that it called ran."""
    found = []
    open_ops: dict[Any, list] = {}
    for event in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        begin, end = _interval(event)
        stack = open_ops.setdefault(event.get("tid"), [])
        while stack and stack[-1][1][-1][1] <= begin:
            stack.pop()
        if stack:  # cut this one out of its caller
            last_begin, last_end = stack[-1][1].pop()
            stack[-1][1].append((last_begin, begin))
            stack[-1][1].append((min(end, last_end), last_end))
        entry = (event, [(begin, end)])
        stack.append(entry)
        found.append(entry)
    return found


def training(cfg: Config, steps: int, trace: Path) -> list[Row]:
    """Profile `steps` steps of the real trainer on synthetic data, and write the trace; nothing else is kept."""
    with tempfile.TemporaryDirectory() as folder:
        Profiled(cfg, Path(folder), steps, trace).train()
    return breakdown(_read(trace), steps)


class Profiled(Trainer):
    """A trainer that records the last `steps` steps of its run, and saves nothing.

    Args:
        config: its `train.iterations` are WARM_UP + 1 + steps.
    """

    def __init__(self, config: Config, run_dir: Path, steps: int, trace: Path):
        super().__init__(config, build_model(config), build_objective(config), build_dataset(config), run_dir)
        self.recorded_from = WARM_UP + 1  # one more, in which the profiler itself warms up
        self.profiler = _profiler(self.world.device, schedule(wait=WARM_UP, warmup=1, active=steps), trace)
        self.engine.step = _recorded(self.engine.step)  # type: ignore[method-assign]

    def train(self) -> dict[str, float]:
        with self.profiler:
            return super().train()

    def _step(self, stream: Iterator[Any]) -> None:
        if self.step == self.recorded_from:
            _wait(self.world.device)
        super()._step(stream)
        if self.step == self.config.train.iterations:
            _wait(self.world.device)
        self.profiler.step()

    def _save(self) -> None:
        pass


def sampling(cfg: Config, batch: int, trace: Path) -> list[Row]:
    """Profile one sampling loop with the config's sampler and guidance, captured if possible, and write the trace.

    Weights, labels and text are random.
    """
    device, m = pick_device(cfg.device), cfg.model
    model = build_model(cfg).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    sampler, scale = build_sampler(cfg), cfg.sample.guidance_scale
    x = torch.randn(batch, m.in_chans, m.img_size, m.img_size, device=device)
    condition: dict[str, Tensor] = {}
    null: dict[str, Tensor | int | None] = {}
    if m.num_classes:
        condition, null = {"y": torch.zeros(batch, dtype=torch.long, device=device)}, {"y": cfg.null_label}
    elif m.context_dim:
        text = torch.randn(batch, m.context_tokens, m.context_dim, device=device)
        condition, null = {"context": text}, {"context": text[0]}
    graphs = GraphSampler(model)

    def draw() -> None:
        if device.type == "cuda":
            graphs(sampler, x, condition, null, scale)
        else:
            eps_fn = Guidance(model, condition, null, scale) if scale else lambda x, t: model(x, t, **condition)
            sampler(eps_fn, x)

    with torch.no_grad(), _profiler(device, schedule(wait=1, warmup=1, active=1), trace) as profiler:
        for _ in range(3):  # the first compiles and captures
            draw()
            _wait(device)
            profiler.step()
    return breakdown(_read(trace), 1)


def table(rows: list[Row]) -> str:
    """Format the rows as text."""
    lines = [f"{'family':16s}{'ms':>10s}{'share':>9s}{'calls':>9s}"]
    lines += [f"{row.family:16s}{row.ms:10.3f}{row.share:9.1%}{row.calls:9.0f}" for row in rows]
    return "\n".join([*lines, f"{'together':16s}{sum(row.ms for row in rows):10.3f}"])


def write(rows: list[Row], path: Path) -> None:
    """Write the rows as CSV."""
    cells = ((row.family, f"{row.ms:.6g}", f"{row.share:.4f}", f"{row.calls:.6g}") for row in rows)
    write_table(path, Row._fields, (dict(zip(Row._fields, each)) for each in cells))


def _profiler(device: torch.device, when: Callable[[int], Any], trace: Path) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return profile(activities=activities, schedule=when, on_trace_ready=lambda p: p.export_chrome_trace(str(trace)))


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, run in the optimizer's range."""

    def run(*args: Any) -> Any:
        with record_function(OPTIMIZER):
            return function(*args)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(trace: Path) -> dict[str, Any]:
    with gzip.open(trace, "rt") as file:
        return json.load(file)
