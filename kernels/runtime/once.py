"""What is made once per stretch of work, such as a sampling loop, and kept until its end."""

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from uvit_fast.kernels.runtime import launch

_kept: ContextVar[dict[tuple, Any] | None] = ContextVar("kept", default=None)
_counting: ContextVar[dict[tuple, Tensor] | None] = ContextVar("counting", default=None)
_early: ContextVar[bool] = ContextVar("early", default=True)
_counters: dict[tuple, Tensor] = {}  # by device and stream, outside of stretches


@contextlib.contextmanager
def stretch(kept: dict[tuple, Any] | None, early: bool = True) -> Iterator[None]:
    """Open a stretch of work on one stream, or continue one, by what it `kept`; None: weights may change in it.

    Args:
        early: whether kernels may begin before the one before them has ended (`runtime.early`).
    """
    token, counting, before = _kept.set(kept), _counting.set({} if kept is None else kept), _early.set(early)
    try:
        yield
    finally:
        _early.reset(before)
        _kept.reset(token)
        _counting.reset(counting)


def kept() -> dict[tuple, Any] | None:
    """Return what the open stretch keeps, keyed by its users; None without one, or if it keeps nothing."""
    return _kept.get()


def met(weight: Tensor) -> bool:
    """Return whether the open stretch has met these weights before: whatever wrote them has ended.

    False without a stretch, or in one that keeps nothing, since there they may still be being written, and for a tensor
    that is made anew each time in another's place.
    """
    known = kept()
    if known is None or not _early.get():
        return False
    whole = weight if weight._base is None else weight._base
    key = ("met", weight.device, weight.data_ptr())
    before = known.get(key)
    known[key] = weakref.ref(whole)
    return before is not None and before() is whole


def counters(device: torch.device, count: int) -> Tensor:
    """Return int32 zeros, at least `count`, for kernels that leave zeros behind: consecutive launches may share them.

    Each stretch has its own, and so has each stream. A capture must not use the counters of the stream, beside which it
    may be replayed, nor those of another capture: it gets new ones for each launch, unless they existed when a
    stretch's capture began, or the stretch keeps nothing and so is no longer than the capture.
    """

    def new() -> Tensor:
        with _disable_current_modes():
            return torch.zeros(max(count, 4096), dtype=torch.int32, device=device)

    known, key = _counting.get(), ("counters", device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if known is None:
        known, key = {} if capturing else _counters, ("counters", device, launch.stream(device))
    if key not in known or len(known[key]) < count:
        if capturing and _kept.get() is not None:
            known = {}
        known[key] = new()
    if launch.listener.here is not None:
        launch.listener.here.counted(known[key], count)
    return known[key]
