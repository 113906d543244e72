"""How kernels are launched: the one place that goes past Triton's launcher, whose Python takes longer than kernels run.

Three short cuts, each tested with Triton 3.6 and 3.8 (`tests/kernels/test_launch.py`, `test_contracts.py`):

- a kernel that Triton has compiled is called directly, found by a key of our own with all that Triton specialises on;
- kernels are known by `id`, because hashing one reads its source; they are module globals and never freed;
- a tensor descriptor is made without its dataclass's checks, which were made once for its box.
"""

import functools
import threading
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from uvit_fast.kernels.runtime.device import guard, interpreting


def cdiv(a: int, b: int) -> int:
    """Return a over b, rounded up; triton's own is made for kernels and slow on the host."""
    return -(-a // b)


_compiled: dict[tuple, Any] = {}


class _Thread(threading.local):
    def __init__(self):
        self.ready: set[int] = set()  # devices whose context is current in this thread, or was


_thread = _Thread()


def run(device: torch.device, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
    """Run kernel[grid](*args, **options) on `device`, found by a look-up of our own: Triton's is too slow.

    Everything that Triton compiles anew for is in the key: dtypes and alignment of tensors, blocks and layouts of
    descriptors, integers that are 1 or multiples of 16, the constants' values.

    Args:
        args: the kernel's first arguments.
        options: its other arguments, constants all, and its launch's (`num_warps`, ...), by name.
    """
    with guard(device):
        if interpreting():
            kernel[grid](*args, **options)
            return
        if device.type == "cuda" and device.index not in _thread.ready:
            # The driver makes TMA descriptors and wants a current context; a new thread, autograd's say, has none.
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
    """Return the names of a kernel's parameters, and which are constants; kept by id: a kernel's hash is slow."""
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


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """Return a view of t, of 16-bit or 8-bit values, in boxes of this shape, in the widest swizzle that fits.

    t's first element is on a 16-byte boundary and its rows are multiples of 16 bytes apart.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {
        **_box(block, t.itemsize),
        "base": t,
        "shape": t.shape,
        "strides": t.stride(),
        "kind": (t.dtype, block),
    }
    return made


@functools.cache
def _box(block: tuple[int, ...], itemsize: int) -> dict:
    """Return the fields of a descriptor that do not depend on its tensor, checked."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16 if itemsize == 2 else gl.float8e4nv)
    example = torch.empty(block, dtype=torch.bfloat16 if itemsize == 2 else torch.float8_e4m3fn, device="meta")
    aligned = 16 // itemsize
    strides = [max(stride, aligned) if i < len(block) - 1 else 1 for i, stride in enumerate(example.stride())]
    return dict(vars(TensorDescriptor(example, list(block), strides, list(block), layout)))
