"""The device that a process computes on, and PyTorch's settings of it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from uvit_fast.runtime.errors import RankError, UserError
from uvit_fast.runtime.text import shown


def pick_device(name: str) -> torch.device:
    """Return the device `cpu`, `cuda`, or, for `auto`, a GPU if there is one; of several GPUs, make that of the
    process's local rank the current one.

    Raises:
        UserError: a GPU was requested and there is none. RankError: this host has fewer GPUs than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: no CUDA device was found; expected a GPU, or device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # set by launchers: one GPU per process
    if local_rank >= torch.cuda.device_count():
        raise RankError(f"launcher: expected a GPU for local rank {local_rank}, got {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def as_device(device: torch.device | str) -> torch.device:
    """Return a device that is given as such, or by PyTorch's name for it: cpu, cuda (the current one), cuda:1.

    Raises:
        UserError: a name of none, or of a GPU that is not here.
    """
    if isinstance(device, torch.device):
        return device
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device: expected cpu, cuda or cuda:1, got {shown(device)}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: expected a GPU that is here, got {torch.cuda.device_count()} GPUs")
    return found


@contextlib.contextmanager
def set_to(backend: Any, **values: object) -> Iterator[None]:
    """Give a backend's settings, such as `fp32_precision` of torch.backends.cuda.matmul, these values while open.

    `fp32_precision` rather than `allow_tf32`, which cannot be read once somebody has set the former.
    """
    before = {name: getattr(backend, name) for name in values}
    try:
        for name, value in values.items():
            setattr(backend, name, value)
        yield
    finally:
        for name, value in before.items():
            if name == "fp32_precision":
                setattr(backend, name, "none")  # it follows torch.backends.fp32_precision again, if it did
            if getattr(backend, name) != value:
                setattr(backend, name, value)
