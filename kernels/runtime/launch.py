"""Kernel launches: the one place that bypasses Triton's launcher, whose Python takes longer than kernels run.

Three shortcuts, each tested with Triton 3.6 and 3.8 (`tests/kernels/test_launch.py`, `test_contracts.py`):

- a kernel that Triton has compiled is called directly, found by our own key, which contains all that Triton specialises
  on;
- kernels are identified by `id`, because hashing one reads its source; they are module globals and never freed;
- a tensor descriptor is made without its dataclass's checks, which are made once per box.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import AsyncCompileMode, FutureKernel, knobs
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from uvit_fast.kernels.runtime.compiling import all_told, told
from uvit_fast.kernels.runtime.device import guard, interpreting
from uvit_fast.runtime.flags import Flag


def cdiv(a: int, b: int) -> int:
    """Return a over b, rounded up; triton's own is for kernels and slow on the host."""
    return -(-a // b)


_compiled: dict[tuple, Any] = {}
THREADS = 16  # that compile: each holds Python's lock for a part of its time only


class _Thread(threading.local):
    def __init__(self):
        self.ready: set[int] = set()  # devices whose context is current in this thread, or was


_thread = _Thread()
_rehearsing = Flag("rehearsing")  # nothing is launched


class _Listener(threading.local):
    here: Any = None  # the `Recorder` of this thread's launches


listener = _Listener()


@contextlib.contextmanager
def _ready(device: torch.device) -> Iterator[None]:
    """Make the device current, and its context, which TMA's maps need: a new thread, such as autograd's, has none."""
    with guard(device):
        if device.index not in _thread.ready:
            torch.cuda.mem_get_info(device)  # queries the runtime, which makes it current
            _thread.ready.add(device.index)
        yield


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which kernels may be launched on the device."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    if device.index in _thread.ready and device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return _ready(device)


def run(device: torch.device, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
    """Run kernel[grid](*args, **options) on `device`, found by our own look-up: Triton's is too slow.

    Everything for which Triton compiles anew is in the key: dtypes and alignment of tensors, blocks and layouts of
    descriptors, integers that are 1 or multiples of 16, the constants' values.
    Args:
        args: the kernel's first arguments.
        options: its other arguments, all constants, and the launch's (`num_warps`, ...), by name.
    """
    with on(device):
        if interpreting():
            run_it = kernel[grid] if listener.here is None else listener.here.interpreted(kernel[grid])
            run_it(*args, **options)
            return
        if _rehearsing:
            kernel.warmup(*args, grid=grid, **options)
            return
        names, constant = _parameters.get(id(kernel)) or _read_parameters(kernel)
        kinds = [v if c else _KINDS.get(type(v), _of_other)(v) for v, c in zip(args, constant)]
        key = (id(kernel), device.index, *options.values(), *kinds)
        values = [*args, *[options[name] for name in names[len(args) :]]]
        compiled = _compiled.get(key)
        if compiled is None:
            with told() as done:
                compiled = kernel[grid](*args, **options)
                if isinstance(compiled, FutureKernel):  # another thread, which is in `ahead`, is compiling it
                    compiled = compiled.result()
                _compiled[key] = compiled
                done()
        else:
            compiled[(*grid, 1, 1)[:3]](*values)
        if listener.here is not None:
            listener.here.launched(Direct(compiled, (*grid, 1, 1)[:3]), values)


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Compile what this thread would launch inside, all at once, and launch nothing. A kernel that cannot be compiled
    says so where it is launched.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, min(cores, THREADS))) as pool:
        with AsyncCompileMode(pool, ignore_errors=True) as mode:
            try:
                with _rehearsing():
                    yield
            except BaseException:
                for each in mode.raw_futures:
                    each.cancel()
                raise
            all_told(mode.raw_futures)


class Direct:
    """A compiled kernel as the C function that launches it, whose arguments are numbers: pointers, and maps for TMA.

    Raises:
        TypeError: Triton's launcher is not a known one, or needs memory of its own.
    """

    def __init__(self, compiled: Any, grid: tuple[int, int, int]):
        launcher = compiled.run
        scratch = (getattr(launcher, name, 0) for name in ("global_scratch_size", "profile_scratch_size"))
        if any(scratch) or getattr(launcher, "gsan_enabled", False):
            raise TypeError("a kernel with memory of its own")
        self.metas = getattr(compiled.metadata, "tensordesc_meta", None)
        self.newer = hasattr(launcher, "arg_annotations")  # 3.8: one function for all kernels; 3.6: one for each
        self.launch = launcher.launch
        if isinstance(self.launch, FunctionType):  # a wrapper around the C function that makes the maps
            cells = dict(zip(self.launch.__code__.co_freevars, self.launch.__closure__ or ()))
            if "launcher" not in cells:
                raise TypeError("an unknown launcher")
            self.launch = cells["launcher"].cell_contents
        flags = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
        self.grid, self.before = grid, flags
        if self.newer:
            self.middle = (compiled.packed_metadata, None, None, None, None, None)
            self.middle += (launcher.arg_annotations, launcher.kernel_signature)
        else:
            self.middle = (None, None, compiled.packed_metadata, None, None, None)

    def call(self, args: list) -> tuple:
        """Return the function's own arguments for a kernel's, with `STREAM` in the stream's place."""
        before = (*self.grid, STREAM, *self.before, *self.middle)
        return (*before, args) if self.newer else (*before, *args)

    def arguments(self, values: list, place: Callable[[Tensor], tuple[int, int]]) -> list:
        """Return a kernel's arguments as numbers, and `Pointer`s where those depend on tensors.

        Args:
            place: place(tensor) -> its slot, and the bytes from the slot's start.

        Raises:
            TypeError: a value that has no such form.
        """
        args: list = []
        metas = iter(self.metas or ())
        for value in values:
            if isinstance(value, TensorDescriptor):
                meta = next(metas, None)
                if meta is None:
                    raise TypeError("a descriptor that is no map of TMA's")
                args += [Pointer(*place(value.base), _maps(value, meta)), *value.shape, *value.strides]
            elif isinstance(value, Tensor):
                args.append(Pointer(*place(value)))
            elif isinstance(value, tuple):
                raise TypeError("a tuple among a kernel's arguments")
            else:
                args.append(value)
        return args


class _Stream:
    """Stand for the stream's handle, which a call fills in."""


STREAM = _Stream()


class Pointer(NamedTuple):
    """A tensor's address, or what TMA reads in its place: that of a slot plus some bytes, which a call fills in."""

    slot: int
    ahead: int
    maps: "_Maps | None" = None


class _Maps(dict):
    """What TMA reads in place of a descriptor, by the address of its tensor; made at first use."""

    def __init__(self, fields: dict, meta: dict):
        super().__init__()
        self.fields, self.meta = fields, meta

    def __missing__(self, pointer: int) -> Any:
        if len(self) >= 4096:  # for memory that comes and goes
            self.clear()
        at = object.__new__(TensorDescriptor)
        at.__dict__ = {**self.fields, "base": SimpleNamespace(data_ptr=lambda: pointer)}
        more = () if make_tensordesc_arg.__code__.co_argcount == 2 else (None,)
        self[pointer] = made = make_tensordesc_arg(at, self.meta, *more)[0]
        return made


_known_maps: dict[str, _Maps] = {}  # by all that a map depends on but the address


def _maps(value: TensorDescriptor, meta: dict) -> _Maps:
    """Return the maps of tensors and boxes like the descriptor's."""
    fields = {**vars(value), "base": None}  # not the tensor, which would stay as long as the process
    return _known_maps.setdefault(repr((fields, meta)), _Maps(fields, meta))


def is_direct(device: torch.device) -> bool:
    """Return whether launches may bypass Triton: on a GPU, without a profiler's hooks."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return (device.type == "cuda" or interpreting()) and not any(getattr(h, "calls", h) for h in hooks)


def stream(device: torch.device) -> int:
    """Return the driver's handle of the current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


_parameters: dict[int, tuple[list[str], list[bool]]] = {}


def _read_parameters(kernel: Any) -> tuple[list[str], list[bool]]:
    """Return the names of a kernel's parameters, and which are constants; cached by id: hashing a kernel is slow."""
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
    """Return a view of t, of 16-bit or 8-bit values, in boxes of this shape, with the widest swizzle that fits.

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
