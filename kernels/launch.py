"""What every op shares on the host: which core runs on a device, the tuning tables, the checks of tensors."""

import contextlib
import functools
import json
import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

ACCUMULATE = torch.float32  # statistics, sums and partial results
_FOLDER = Path(__file__).parent / "tuning"


_INTERPRETING = (
    triton.knobs.runtime.interpret
)  # as it is when kernels are defined; slow to ask, and not by torch.compile


def interpreting() -> bool:
    """Whether triton's interpreter stands in for a GPU (TRITON_INTERPRET=1)."""
    return _INTERPRETING


def architecture(device: torch.device) -> int:
    """The architecture whose kernels and table a device takes: 90 on Hopper, 80 elsewhere (plain Triton runs anywhere)."""
    return 90 if device.type == "cuda" and capability(device.index) == 9 else 80


@torch.compiler.assume_constant_result
def capability(index: int | None) -> int:
    """The major compute capability of a CUDA device."""
    return _properties(index).major


@functools.cache
def _properties(index: int | None):
    return torch.cuda.get_device_properties(index)


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


def cdiv(a: int, b: int) -> int:
    """a over b, rounded up; triton's own is made for kernels and slow on the host."""
    return -(-a // b)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once where one takes a whole multiprocessor."""
    return _properties(device.index).multi_processor_count


def guard(device: torch.device):
    """Launch on the device that holds the tensors, whichever is current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


_compiled: dict[tuple, Any] = {}


class _Thread(threading.local):
    def __init__(self):
        self.ready: set[int] = set()  # devices whose context is current in this thread, or was


_thread = _Thread()


def run(device: torch.device, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
    """kernel[grid](*args, **options) on `device`, by a look-up of our own: Triton's costs the host more than the kernels take.

    Everything that Triton compiles anew for is in the key: dtypes and alignment of tensors, blocks and layouts of descriptors,
    integers that are 1 or multiples of 16, the constants' values.

    Args:
        args: the kernel's first arguments.
        options: its other arguments, constants all, and its launch's (`num_warps`, ...), by name.
    """
    with guard(device):
        if interpreting():
            kernel[grid](*args, **options)
            return
        if device.type == "cuda" and device.index not in _thread.ready:
            # TMA descriptors are made by the driver, which wants a current context; a new thread, autograd's say, has none.
            torch.cuda.mem_get_info(device)  # asks the runtime, which makes it current
            _thread.ready.add(device.index)
        names, constant = _parameters.get(id(kernel)) or _read_parameters(kernel)
        kinds = [v if c else _KINDS.get(type(v), _of_other)(v) for v, c in zip(args, constant)]
        key = (id(kernel), device.index, *options.values(), *kinds)
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = kernel[grid](*args, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*args, *[options[name] for name in names[len(args) :]])


_parameters: dict[int, tuple[list[str], list[bool]]] = {}


def _read_parameters(kernel: Any) -> tuple[list[str], list[bool]]:
    """The names of a kernel's parameters, and which are constants; kept by id, because a kernel's hash is slow."""
    _parameters[id(kernel)] = [p.name for p in kernel.params], [p.is_constexpr for p in kernel.params]
    return _parameters[id(kernel)]


@functools.cache
def _of_int(value: int) -> int:
    return (value == 1) + 2 * (value % 16 == 0) + 4 * (value >= 2**31)


def _of_tensor(value: Tensor) -> tuple:
    return value.dtype, value.data_ptr() % 16 == 0


def _of_other(value: Any) -> Any:
    return getattr(value, "kind", type(value))  # a tensor descriptor's dtype and block; float, None


_KINDS = {int: _of_int, Tensor: _of_tensor, torch.nn.Parameter: _of_tensor}  # what Triton specialises on, by type


def why_not(x: Tensor, weights: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> str | None:
    """The objection that all fused ops share, or None.

    Args:
        x: (..., D), the op's first input.
        weights: name -> tensor and the shape that it must have; the tensor may be None.
    """
    if x.device.type != "cuda" and not interpreting():
        return f"the tensors are on {x.device.type}; the fused ops run on CUDA"
    if x.device.type == "cuda" and capability(x.device.index) < 8:
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
