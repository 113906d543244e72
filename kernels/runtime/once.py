"""What is made once for a stretch of work, such as a sampling loop, and kept until its end."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_kept: ContextVar[dict[tuple, Any] | None] = ContextVar("kept", default=None)
_counters: dict[tuple, Tensor] = {}  # by device and stream, outside of such stretches


@contextlib.contextmanager
def stretch(keep: bool = True) -> Iterator[None]:
    """Open a stretch of work in which weights do not change, on one stream; without `keep` close it for a while."""
    token = _kept.set({} if keep else None)
    try:
        yield
    finally:
        _kept.reset(token)


def kept() -> dict[tuple, Any] | None:
    """Return what the stretch that is open keeps, by keys of its users; None where none is open."""
    return _kept.get()


def counters(device: torch.device, count: int) -> Tensor:
    """Return int32 zeros, at least `count`, for kernels that leave zeros behind: launches in turn may share them.

    A stretch has its own, and so has each stream. What is captured outside of a stretch has them anew for each launch,
    as nobody knows beside what it will be replayed.
    """

    def new() -> Tensor:
        return torch.zeros(max(count, 4096), dtype=torch.int32, device=device)

    kept, key = _kept.get(), ("counters", device)
    if kept is None and device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return new()
        kept, key = _counters, (device, torch.cuda.current_stream(device).cuda_stream)
    if kept is None:
        return new()
    if key not in kept or len(kept[key]) < count:
        kept[key] = new()
    return kept[key]
