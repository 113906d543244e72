"""CUDA graphs: record a function's launches once, then replay them on the same memory without the host's work."""

import contextlib
import functools
import gc
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.flags import Flag


def allowed() -> bool:
    """Return whether automatic captures are allowed: not with UVIT_FAST_CUDA_GRAPHS=0 in the environment."""
    asked = os.environ.get("UVIT_FAST_CUDA_GRAPHS") or "1"
    if asked not in ("0", "1"):
        raise UserError(f"UVIT_FAST_CUDA_GRAPHS: expected 0 or 1, got {asked!r}")
    return asked == "1"


recording = Flag("recording")  # all runs as written: it is being recorded, or rehearsed for that


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the current one, if it is a CUDA device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


class Graphs(Protocol):
    """Records a function once and replays it."""

    def why_not(self, device: torch.device) -> str | None:
        """Return why nothing can be captured on a device, or None if captures work."""

    def budget(self, device: torch.device) -> int:
        """Return how many bytes captures may hold on a device unless the caller sets a bound."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run something with each kind of kernel once, where capturing will happen, to get lazy initialisation done."""

    def pool(self) -> Any:
        """Return memory for captures."""

    def capture(self, run: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any, int]:
        """Record run(); return a replay, run's result, which a replay fills, and the bytes held.

        Args:
            pool: from `pool`, shared by captures that are replayed in the order in which they were made; default: its
                own.

        Raises:
            RuntimeError: run() does something that cannot be recorded.
        """


class CudaGraphs:
    """PyTorch's CUDA graphs."""

    def why_not(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, not {device.type}"

    def budget(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).total_memory // 2

    def warm_up(self, run: Callable[[], Any]) -> None:
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)

    def pool(self) -> tuple[int, int]:
        return torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any, int]:
        with _one_at_a_time:
            return self._capture(run, pool)

    def _capture(self, run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, int]:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph, pool = torch.cuda.CUDAGraph(), pool or self.pool()
        with torch.cuda.stream(_side_stream(torch.cuda.current_device())):
            # thread_local: a loader thread that pins memory meanwhile does not break the capture
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = run()
                graph.capture_end()
            except BaseException:
                _abandon(graph, pool)
                raise
        return graph.replay, output, max(0, torch.cuda.memory_reserved() - before)


_one_at_a_time = threading.RLock()  # the allocator frees nothing while another thread captures


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """Return the stream of all warm-ups and captures of a device: cuBLAS keeps a workspace per stream."""
    return torch.cuda.Stream(index)


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a failed capture. If CUDA invalidated it, torch's allocator and generator are left capturing: mend both."""
    try:
        graph.capture_end()
    except RuntimeError:
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # it may not have come that far
            torch._C._cuda_endAllocateToPool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
