"""What every op shares on the host: which core runs on a device, the tuning tables, the checks of tensors."""

import contextlib
import functools
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor

ACCUMULATE = torch.float32  # statistics, sums and partial results
_FOLDER = Path(__file__).parent / "tuning"


def interpreting() -> bool:
    """Whether triton's interpreter stands in for a GPU (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret


def architecture(device: torch.device) -> int:
    """The architecture whose kernels and table a device takes: 90 on Hopper, 80 elsewhere (plain Triton runs anywhere)."""
    if device.type != "cuda":
        return 80
    return 90 if torch.cuda.get_device_properties(device).major == 9 else 80


def core(device: torch.device) -> ModuleType:
    """The GEMM core of a device: gemm_hopper or gemm_ampere, which share one contract."""
    name = "gemm_hopper" if architecture(device) == 90 else "gemm_ampere"
    return import_module(f".{name}", __package__)


def path(arch: int) -> Path:
    """The file of an architecture's tuning table."""
    return _FOLDER / f"sm_{arch}.json"


@functools.cache
def table(arch: int) -> dict:
    """The tuning table of the nearest architecture that has one: case -> choices, and "default"."""
    known = sorted(int(file.stem.removeprefix("sm_")) for file in _FOLDER.glob("sm_*.json"))
    nearest = min(known, key=lambda a: abs(a - arch))
    return json.loads(path(nearest).read_text())


def choice(device: torch.device, case: str, width: int | str) -> dict:
    """The tuned choices of one case: those of this width (or NxK) where it has its own, over the case's, over the defaults."""
    found = table(architecture(device))
    return found["default"] | found.get(case, {}) | found.get(f"{case}:{width}", {})


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once where one takes a whole multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def guard(device: torch.device):
    """Launch on the device that holds the tensors, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def why_not(x: Tensor, weights: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> str | None:
    """The objection that all fused ops share, or None.

    Args:
        x: (..., D), the op's first input.
        weights: name -> tensor and the shape that it must have; the tensor may be None.
    """
    if x.device.type != "cuda" and not interpreting():
        return f"the tensors are on {x.device.type}; the fused ops run on CUDA"
    if x.device.type == "cuda" and torch.cuda.get_device_properties(x.device).major < 8:
        return "the device is older than compute capability 8.0"
    if x.dtype not in (torch.bfloat16, torch.float16) and not (interpreting() and x.dtype == torch.float32):
        return f"the dtype is {x.dtype}; the fused ops take bfloat16 and float16"
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if x.shape[-1] % 64:
        return f"the width {x.shape[-1]} is no multiple of 64"
    for name, (tensor, shape) in weights.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"{name} has the shape {tuple(tensor.shape)}, not {shape}"
        if tensor.dtype != x.dtype or tensor.device != x.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}"
    return None


def rows(x: Tensor) -> Tensor:
    """(..., D) as contiguous, 16-byte aligned rows (tokens, D); copies only where the layout asks for it."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat.clone() if x.device.type == "cuda" and flat.data_ptr() % 16 else flat
