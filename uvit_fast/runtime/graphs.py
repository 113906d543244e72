"""CUDA graphs: record what a function launches once, then replay it on the same memory without the host's work."""

import contextlib
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


def allowed() -> bool:
    """Whether what needs no asking may be captured: not with UVIT_FAST_CUDA_GRAPHS=0 in the environment."""
    asked = os.environ.get("UVIT_FAST_CUDA_GRAPHS") or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"UVIT_FAST_CUDA_GRAPHS: expected 0 or 1, got {asked!r}")
    return asked == "1"


class _Recording(threading.local):
    depth = 0


_recording = _Recording()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """While open, in this thread, everything runs as it is written: it is being recorded, or rehearsed for that."""
    _recording.depth += 1
    try:
        yield
    finally:
        _recording.depth -= 1


def is_recording() -> bool:
    """Whether this thread is within `recording`."""
    return _recording.depth > 0


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """`device` as the current one, where it is a CUDA device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


class Graphs(Protocol):
    """What can record a function once and replay it."""

    def why_not(self, device: torch.device) -> str | None:
        """Why nothing can be captured on a device; None where it can."""

    def budget(self, device: torch.device) -> int:
        """Bytes that captures may hold on a device where the caller names no bound."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run what has each kind of kernel once, where capturing will happen, so that everything lazy is done."""

    def pool(self) -> Any:
        """Memory for captures."""

    def capture(self, run: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any, int]:
        """Record run(): a replay, run's result, which a replay fills, the bytes that it holds.

        Args:
            pool: from `pool`, shared with captures that are replayed in the order in which they were made; default: its own.

        Raises:
            RuntimeError: run() does something that cannot be recorded.
        """


class CudaGraphs:
    """The real ones."""

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
            # thread_local: a loader's thread that pins memory meanwhile does not break the capture
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
    """Where all warm-ups and captures of a device run: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(index)


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a capture that failed. Where CUDA has invalidated it, torch's allocator and generator are left capturing: mend both."""
    try:
        graph.capture_end()
    except RuntimeError:
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # it had come that far
            torch._C._cuda_endAllocateToPool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
