"""An op's work on the host, recorded at its second call with tensors of a kind and replayed from then on.

An op's Python (checks, tiles, descriptors, keys) takes longer than its kernels run. It depends on shapes, dtypes and
alignments alone, so its outcome is a list: memory, launches with all arguments in place except the pointers, calls of
PyTorch. The recording is made while the op runs, so it needs no knowledge of the op. What it cannot express runs as
written.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_in_torch_dispatch_mode

from uvit_fast.kernels.runtime import device as devices
from uvit_fast.kernels.runtime import launch, once
from uvit_fast.kernels.runtime.launch import cdiv
from uvit_fast.runtime.flags import Flag

MOST = 64  # kinds of tensors per op; ten programs serve a network and its training
ALIGNED = 512  # bytes, as PyTorch's allocator aligns
ALONE = 32 << 20  # bytes; what is larger has memory of its own, which others can have before the program ends
_PLAIN = (Tensor, torch.nn.Parameter)
_ALLOCATIONS = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
_HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}
suspended = Flag("suspended")  # ops run as written: what they do depends on more than their arguments


def free(t: Tensor) -> None:
    """Release the memory of an argument that nobody reads any more, whoever holds it."""
    t.untyped_storage().resize_(0)
    if launch.listener.here is not None:
        launch.listener.here.freed(t)


class Programs:
    """A function of tensors and numbers, run as written or, for arguments of a known kind, by its program."""

    def __init__(self, function: Callable):
        self.function = function
        self._known: dict[tuple, Program | None] = {}  # None: seen once, or impossible to record
        self._never: dict[tuple, str] = {}  # and why

    def __call__(self, *args: Any) -> Any:
        return self.follow(self.kind(args), args)

    def kind(self, args: tuple) -> tuple | None:
        """Return what decides which recording serves these arguments, or None if none can."""
        key: list = [devices.forced_architecture(), torch.is_autocast_enabled()]
        for a in args:
            if type(a) in _PLAIN:
                key += a.shape, a.stride(), a.dtype, a.data_ptr() % 16
            elif isinstance(a, Tensor):
                return None
            else:
                key.append(a)
        key.append(args[0].device.index)
        return tuple(key)

    def follow(self, kind: tuple | None, args: tuple) -> Any:
        """Return what the function gives for arguments of this kind."""
        device = args[0].device
        program = self._known.get(kind)
        if kind is None or suspended or is_in_torch_dispatch_mode() or not launch.is_direct(device):
            return self.function(*args)
        if program is not None:
            return program.run(args, device)
        if kind in self._never:
            return self.function(*args)
        if kind not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[kind] = None
            return self.function(*args)
        recorder = _Recorder(args)
        if recorder.overlap:  # whose memory would one in both be?
            return self.function(*args)
        with recorder:
            output = self.function(*args)
        try:
            self._known[kind] = recorder.program(output)
        except _Unspeakable as error:
            self._never[kind] = str(error)
        return output


class _Unspeakable(Exception):
    """Something that a program cannot express."""


class _Ref:
    """A tensor, identified by its memory: `slot` among the arguments and the program's allocations."""

    def __init__(self, slot: int, ahead: int, t: Tensor):
        self.slot, self.ahead, self.how = slot, ahead // t.element_size(), (t.shape, t.stride())
        self.whole = False  # whether it is exactly the slot's content


class _Call(NamedTuple):
    """A call of a PyTorch op or of a launcher. Results in new memory go to slots."""

    function: Callable
    args: Sequence
    options: dict[str, Any]
    slots: Sequence[int | None] = ()
    several: bool = False  # whether the function returns a sequence

    def line(self, say: "_Source") -> str:
        args = [say(v) for v in self.args] + [f"{name}={say(v)}" for name, v in self.options.items()]
        results = ", ".join("_" if slot is None else f"t{slot}" for slot in self.slots) + "," * self.several
        into = f"{results} = " if any(slot is not None for slot in self.slots) else ""
        return f"{into}{say(self.function)}({', '.join(args)})"


class _Allocate:
    """An allocation. Its shape and strides may still be changed to a view's."""

    def __init__(self, slot: int, how: tuple, dtype: torch.dtype, device: torch.device):
        self.slots, self.how, self.options = [slot], how, {"dtype": dtype, "device": device}

    def line(self, say: "_Source") -> str:
        return _Call(torch.empty_strided, self.how, self.options, self.slots).line(say)


class _Free(NamedTuple):
    """The release of an argument's memory."""

    slot: int
    slots: Sequence[int | None] = ()

    def line(self, say: "_Source") -> str:
        return f"t{self.slot}.untyped_storage().resize_(0)"


_Step = _Call | _Allocate | _Free


class Program:
    """Steps in order, over tensors by slot: the arguments, then the allocations.

    Written as the source of a function, since Python runs that in half the time of a loop over steps: t3 is the tensor
    in slot 3 and p3 its address.

    Args:
        steps: each with the slots that nothing reads after it.
        arguments: number of slots that are arguments.
        inside: for slots without memory of their own, the slot in whose memory they lie, and bytes from its start.
    """

    def __init__(
        self,
        steps: Sequence[tuple[_Step, Sequence[int]]],
        arguments: int,
        output: Any,
        inside: dict[int, tuple[int, int]],
    ):
        say, body = _Source(inside), []
        for step, released in steps:
            body.append((step.line(say), step.slots))
            body += [(f"del t{slot}", ()) for slot in released]
        body.append((f"return {say(output)}", ()))
        start = (f"def run(stream, {', '.join(f't{slot}' for slot in range(arguments))}):", range(arguments))
        lines = []
        for line, slots in [start, *body]:
            lines += [line, *(f"p{slot} = t{slot}.data_ptr()" for slot in slots if slot in say.addressed)]
        exec("\n    ".join(lines), say.names)
        self._run = say.names["run"]

    def run(self, args: tuple, device: torch.device) -> Any:
        with launch.on(device):
            return self._run(launch.stream(device), *args)


class _Source:
    """Writes values as expressions of a program: slots and small constants as such, others as names.

    Attributes:
        names: name -> value.
        addressed: slots whose addresses are read.
    """

    def __init__(self, inside: dict[int, tuple[int, int]]):
        self.inside = inside
        self.names: dict[str, Any] = {}
        self.addressed: set[int] = set()
        self._known: dict[int, str] = {}

    def __call__(self, value: Any) -> str:
        if isinstance(value, launch.Pointer):
            slot, start = self.inside.get(value.slot, (value.slot, 0))
            self.addressed.add(slot)
            address = f"p{slot} + {start + value.ahead}" if start + value.ahead else f"p{slot}"
            return address if value.maps is None else f"{self(value.maps)}[{address}]"
        if isinstance(value, _Ref):
            if value.whole:
                return f"t{value.slot}"
            shape, strides = map(self, value.how)
            return f"t{value.slot}.as_strided({shape}, {strides}, t{value.slot}.storage_offset() + {value.ahead})"
        if value is launch.STREAM:
            return "stream"
        if value is None or type(value) in (bool, int):
            return repr(value)
        if type(value) is list:
            return f"[{', '.join(map(self, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self(v)}, ' for v in value)})"
        name = self._known.setdefault(id(value), f"v{len(self._known)}")
        self.names[name] = value  # which keeps its id
        return name


class _Recorder(TorchDispatchMode):
    """Makes the recording: sees PyTorch's ops as a dispatch mode, and launches through `launch.run`, which calls it."""

    def __init__(self, args: tuple):
        super().__init__()
        self.args = args
        self.wholes: list[Any] = list(args)
        self.roots: dict[int, int] = {}  # storage -> slot, for allocations
        spans = [(a.data_ptr(), _extent(a), i) for i, a in enumerate(args) if isinstance(a, Tensor) and a.numel()]
        self.spans = sorted(spans)
        self.inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        self.refs: list[_Ref] = []
        self.steps: list[_Step] = []
        self.uses: list[set[int]] = []  # slots of each step
        self.overlap = any(a + size > b for (a, size, _), (b, _, _) in zip(self.spans, self.spans[1:]))
        self.trouble = ""
        self.alive: list[Any] = []  # keeps addresses from being reused

    def __enter__(self) -> "_Recorder":
        launch.listener.here = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        launch.listener.here = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.alive.append((args, kwargs, out))
        name, results = func._schema.name, out if isinstance(out, tuple | list) else (out,)
        if name in _ALLOCATIONS:
            slot = self._new(out)
            self._add(_Allocate(slot, (out.shape, out.stride()), out.dtype, out.device), {slot})
        elif name in _HOST_READS or not all(isinstance(t, Tensor) for t in results):
            self.trouble = name
        elif func._schema.is_mutable or not all(self._known(t) for t in results):
            self._call(func, args, kwargs, results, out is results)
        return out  # otherwise a view, described by whoever reads it

    def _call(self, func: Callable, args: tuple, kwargs: dict, results: tuple | list, several: bool = False) -> None:
        used: set[int] = set()
        try:
            args = self._refs(args, used)
            kwargs = {name: self._refs(value, used) for name, value in kwargs.items()}
        except _Unspeakable as error:
            self.trouble = f"{func}: {error}"
        else:
            slots = [None if self._known(t) else self._new(t) for t in results]
            self._add(_Call(func, args, kwargs, slots, several), used | {s for s in slots if s is not None})

    def launched(self, direct: launch.Direct, values: list) -> None:
        """Record a kernel launch with these arguments."""
        self.alive.append(values)
        try:
            args = direct.arguments(values, self._place)
        except (_Unspeakable, TypeError) as error:
            self.trouble = f"a launch: {error}"
        else:
            slots = {arg.slot for arg in args if isinstance(arg, launch.Pointer)}
            self._add(_Call(direct.launch, direct.call(args), {}), slots)

    def interpreted(self, kernel: Callable) -> Callable:
        """Wrap a kernel of Triton's interpreter so that its run is recorded, and nothing inside it."""

        def run(*args: Any, **options: Any) -> None:
            self._call(kernel, args, options, ())
            with _disable_current_modes():
                kernel(*args, **options)

        return run

    def counted(self, t: Tensor, count: int) -> None:
        """Record a request for counters."""
        slot = self._new(t)
        self._add(_Call(once.counters, (t.device, count), {}, [slot]), {slot})

    def freed(self, t: Tensor) -> None:
        slots = [i for i, a in enumerate(self.args) if a is t]
        if slots:
            self._add(_Free(slots[0]), {slots[0]})
        else:
            self.trouble = "freed memory that is no argument's"

    def program(self, output: Any) -> Program:
        """Return the recording as a program with such an output."""
        if self.trouble:
            raise _Unspeakable(self.trouble)
        kept: set[int] = set()
        output = self._refs(output, kept)
        self._shape(output)
        last = {slot: i for i, used in enumerate(self.uses) for slot in used}
        passing, unused = self._passing(last)
        starts, size = _packed(passing)
        common = len(self.wholes)  # the slot of all that passes
        steps: list[tuple[_Step, list[int]]] = []
        if passing:
            device = self.wholes[next(iter(passing))].device
            steps.append((_Allocate(common, ((size,), (1,)), torch.uint8, device), []))
        left_out = passing.keys() | unused
        for i, step in enumerate(self.steps):
            if not left_out.intersection(step.slots):
                released = [s for s in self.uses[i] if s >= len(self.args) and last[s] == i and s not in kept]
                steps.append((step, [s for s in released if s not in left_out]))
        inside = {slot: (common, start) for slot, start in starts.items()}
        return Program(steps, len(self.args), output, inside)

    def _passing(self, last: dict[int, int]) -> tuple[dict[int, tuple[int, int, int]], set[int]]:
        """Return the allocations that only launches use, slot -> (first step, last step, bytes), and the slots of those
        that nothing uses.

        Args:
            last: slot -> the last step that uses it.
        """
        read = {ref.slot for ref in self.refs}  # as tensors
        passing, unused = {}, set()
        for i, step in enumerate(self.steps):
            slot = step.slots[0] if isinstance(step, _Allocate) else None
            if slot is None or slot in read:
                continue
            size = _extent(self.wholes[slot])
            if last[slot] == i:
                unused.add(slot)
            elif 0 < size <= ALONE:
                passing[slot] = i, last[slot], size
        return passing, unused

    def _add(self, step: _Step, used: set[int]) -> None:
        self.steps.append(step)
        self.uses.append(used)

    def _new(self, t: Tensor) -> int:
        self.roots[t.untyped_storage()._cdata] = len(self.wholes)
        self.wholes.append(t)
        return len(self.wholes) - 1

    def _known(self, t: Tensor) -> bool:
        storage = t.untyped_storage()._cdata
        return storage in self.roots or storage in self.inputs

    def _place(self, t: Tensor) -> tuple[int, int]:
        """Return the slot, and the bytes from its start."""
        slot = self.roots.get(t.untyped_storage()._cdata)
        if slot is not None:
            return slot, t.data_ptr() - self.wholes[slot].data_ptr()
        for start, size, i in self.spans:
            if start <= t.data_ptr() < start + size:
                return i, t.data_ptr() - start
        raise _Unspeakable(f"a tensor {tuple(t.shape)} from elsewhere")

    def _ref(self, t: Tensor, used: set[int]) -> _Ref:
        slot, ahead = self._place(t)
        used.add(slot)
        if t.dtype != self.wholes[slot].dtype:
            raise _Unspeakable(f"a view of another dtype, {t.dtype}")
        self.refs.append(_Ref(slot, ahead, t))
        return self.refs[-1]

    def _shape(self, output: Any) -> None:
        """Allocate results in their final shape, and note which tensors are all that a slot holds."""
        how = [isinstance(t, Tensor) and (t.shape, t.stride()) for t in self.wholes]
        allocations = {step.slots[0]: step for step in self.steps if isinstance(step, _Allocate)}
        for ref in output if isinstance(output, tuple) else (output,):
            if ref is None:
                continue
            t = self.wholes[ref.slot]
            if ref.slot in allocations and ref.ahead == 0 and t.is_contiguous() and _size(ref.how) == t.numel():
                how[ref.slot] = allocations[ref.slot].how = ref.how
        for ref in self.refs:
            ref.whole = ref.ahead == 0 and ref.how == how[ref.slot]

    def _refs(self, value: Any, used: set[int]) -> Any:
        if isinstance(value, Tensor):
            return self._ref(value, used)
        if type(value) in (tuple, list):
            return type(value)([self._refs(v, used) for v in value])
        return value


def _packed(spans: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Place tensors in one memory such that those whose spans overlap do not.

    Args:
        spans: slot -> (first step, last step, bytes).

    Returns:
        slot -> bytes from the start, multiples of `ALIGNED`; and the bytes of the whole.
    """
    starts: dict[int, int] = {}
    for slot, (first, last, size) in sorted(spans.items(), key=lambda item: -item[1][2]):
        at, others = 0, ((starts[s], *spans[s]) for s in starts)
        for start, begins, ends, taken in sorted(others):
            if begins <= last and first <= ends:
                if at + size <= start:
                    break
                at = max(at, start + cdiv(taken, ALIGNED) * ALIGNED)
        starts[slot] = at
    return starts, max((starts[slot] + spans[slot][2] for slot in starts), default=0)


def _size(how: tuple) -> int:
    """Return the number of elements of a contiguous shape; 0 for others."""
    shape, stride = how
    wanted = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return math.prod(shape) if all(n == 1 or s == w for n, s, w in zip(shape, stride, wanted)) else 0


def _extent(t: Tensor) -> int:
    """Return the bytes from the first to the last element."""
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size()
