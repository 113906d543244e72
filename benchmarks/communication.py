"""How much a step passes to collectives, their share of its time, and what they would take with more GPUs."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Volume(TorchDispatchMode):
    """Count the bytes that this rank passes to collectives: their largest tensor; a rank sends (N - 1) / N of it."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            name = func._schema.name.partition("::")[2].strip("_")
            self.bytes[name] = self.bytes.get(name, 0) + max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def profiled_shares(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Return shares of some steps' time on the device: a collective runs; only a collective runs; nothing runs."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        annotation = getattr(event, "is_user_annotation", False)  # a span around what others run
        if event.device_type == torch.autograd.DeviceType.CUDA and not annotation:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    return shares(spans[True], spans[False])


def shares(collectives: list[tuple[float, float]], others: list[tuple[float, float]]) -> dict[str, float]:
    """Return comm_share, exposed_share and idle_share of the whole time, from (start, end) of what ran on a device."""
    both = collectives + others
    whole = max(end for _, end in both) - min(start for start, _ in both)
    return {
        "comm_share": _covered(collectives) / whole,
        "exposed_share": (_covered(both) - _covered(others)) / whole,
        "idle_share": 1 - _covered(both) / whole,
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of a union of spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def calculate(gpus: int, measured: int, one: float, step: float, exposed: float) -> float:
    """Return milliseconds of a step on `gpus` GPUs of one switch, from a measured number of them; a calculation.

    A ring moves (N - 1) / N of the volume past every GPU, whose link is the same for any N: exposed communication grows
    by that factor. Everything else takes as long as before, including the optimizer's share of a step, which only
    shrinks.

    Args:
        one, step: milliseconds of a step on one GPU and on `measured` GPUs. exposed: the share of `step` in which
            communication is exposed.
    """
    growth = (1 - 1 / gpus) / (1 - 1 / measured)
    return max(one, step * (1 - exposed)) + step * exposed * growth
