"""A device's architecture, its multiprocessors, and whether Triton's interpreter replaces it."""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
import triton

from uvit_fast.runtime.errors import UserError

# As it is when kernels are defined: slow to query, and torch.compile must not query it.
_INTERPRETING = triton.knobs.runtime.interpret


def _forced() -> int | None:
    asked = os.environ.get("UVIT_FAST_ARCH") or None
    if asked not in (None, "80", "90"):
        raise UserError(f"UVIT_FAST_ARCH: expected 80 or 90, got {asked!r}")
    return None if asked is None else int(asked)


_FORCED = _forced()


@contextlib.contextmanager
def forced(arch: int) -> Iterator[None]:
    """Give every device the kernels and the table of this architecture, 80 or 90, while open."""
    global _FORCED
    before, _FORCED = _FORCED, arch
    try:
        yield
    finally:
        _FORCED = before


def forced_architecture() -> int | None:
    """Return the architecture forced on every device, if any."""
    return _FORCED


def interpreting() -> bool:
    """Return whether Triton's interpreter replaces the GPU (TRITON_INTERPRET=1)."""
    return _INTERPRETING


def architecture(device: torch.device) -> int:
    """Return the architecture whose kernels and table a device uses: 90 on Hopper, else 80 (runs anywhere).

    UVIT_FAST_ARCH=80 in the environment selects the kernels of an A100 on Hopper too.
    """
    if _FORCED is not None:
        return _FORCED
    return 90 if device.type == "cuda" and capability(device.index) == 9 else 80


def capability(index: int | None) -> int:
    """Return the major compute capability of a CUDA device."""
    return _properties(index).major


capability._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which imports the compiler: seconds


def described(device: torch.device) -> str:
    """Return a device's name and compute capability, as an error says what came."""
    if device.type != "cuda":
        return f"device {device.type}" if torch.cuda.is_available() else "no CUDA device"
    if _FORCED is not None:
        return f"UVIT_FAST_ARCH={_FORCED}"
    found = _properties(device.index)
    return f"{found.name}, {found.major}.{found.minor}"


@functools.cache
def _properties(index: int | None):
    return torch.cuda.get_device_properties(index)


def multiprocessors(device: torch.device) -> int:
    """Return how many programs run at once if each takes a whole multiprocessor."""
    return _properties(device.index).multi_processor_count


def guard(device: torch.device):
    """Launch on the device that holds the tensors, whichever is current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
