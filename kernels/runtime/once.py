"""What is made once per stretch of work, such as a sampling loop, and kept until its end."""

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from uvit_fast.kernels.runtime import launch


class _Stretch(NamedTuple):
    kept: dict[tuple, Any] | None  # by its users; None: weights may change in it
    counters: dict[tuple, Tensor]  # its own; kept with the rest, if it keeps anything


# The open one, by thread: for ops that a network calls, whose forward could not pass it on.
_open: ContextVar[_Stretch | None] = ContextVar("open", default=None)
_counters: dict[tuple, Tensor] = {}  # by device and stream, outside of stretches


@contextlib.contextmanager
def stretch(kept: dict[tuple, Any] | None) -> Iterator[None]:
    """Open a stretch of work on one stream, or continue one, by what it `kept`; None: weights may change in it."""
    token = _open.set(_Stretch(kept, {} if kept is None else kept))
    try:
        yield
    finally:
        _open.reset(token)


def kept() -> dict[tuple, Any] | None:
    """Return what the open stretch keeps, keyed by its users; None without one, or if it keeps nothing."""
    here = _open.get()
    return None if here is None else here.kept


def met(weight: Tensor) -> bool:
    """Return whether the open stretch has met these weights before: whatever wrote them has ended.

    False without a stretch, or in one that keeps nothing, since there they may still be being written, and for a tensor
    that is made anew each time in another's place.
    """
    here = _open.get()
    if here is None or here.kept is None:
        return False
    whole = weight if weight._base is None else weight._base
    key = ("met", weight.device, weight.data_ptr())
    before = here.kept.get(key)
    here.kept[key] = weakref.ref(whole)
    return before is not None and before() is whole


def counters(device: torch.device, count: int) -> Tensor:
    """Return int32 zeros, at least `count`, for kernels that leave zeros behind: consecutive launches may share them.

    Each stretch has its own, and so has each stream. A capture must not use the counters of the stream, beside which it
    may be replayed, nor those of another capture: it gets new ones for each launch, unless they existed when a
    stretch's capture began, or the stretch keeps nothing and so is no longer than the capture.
    """
    here, key = _open.get(), ("counters", device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if here is None:
        known, key = {} if capturing else _counters, ("counters", device, launch.stream(device))
    else:
        known = here.counters
    if key not in known or len(known[key]) < count:
        if capturing and kept() is not None:
            known = {}
        with _disable_current_modes():
            known[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    if launch.listener.here is not None:
        launch.listener.here.counted(known[key], count)
    return known[key]
