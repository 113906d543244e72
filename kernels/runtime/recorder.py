"""The recorder of an op's work on the host: what it allocates, launches and calls of PyTorch, in order, by memory."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from uvit_fast.kernels.runtime import launch, once
from uvit_fast.kernels.runtime.launch import cdiv

ALIGNED = 512  # bytes, as PyTorch's allocator aligns
ALONE = 32 << 20  # bytes; what is larger has memory of its own, which others can have before the program ends
_ALLOCATIONS = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
_HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}
Say = Callable[[Any], str]  # a value as an expression of a program


class Unspeakable(Exception):
    """Something that a program cannot express."""


class Ref:
    """A tensor, identified by its memory: `slot` among the arguments and the program's allocations."""

    def __init__(self, slot: int, ahead: int, t: Tensor):
        self.slot, self.ahead, self.how = slot, ahead // t.element_size(), (t.shape, t.stride())
        self.whole = False  # whether it is exactly the slot's content


class Call(NamedTuple):
    """A call of a PyTorch op or of a launcher. Results in new memory go to slots."""

    function: Callable
    args: Sequence
    options: dict[str, Any]
    slots: Sequence[int | None] = ()
    several: bool = False  # whether the function returns a sequence

    def line(self, say: Say) -> str:
        args = [say(v) for v in self.args] + [f"{name}={say(v)}" for name, v in self.options.items()]
        results = ", ".join("_" if slot is None else f"t{slot}" for slot in self.slots) + "," * self.several
        into = f"{results} = " if any(slot is not None for slot in self.slots) else ""
        return f"{into}{say(self.function)}({', '.join(args)})"


class Allocate:
    """An allocation. Its shape and strides may still be changed to a view's."""

    def __init__(self, slot: int, how: tuple, dtype: torch.dtype, device: torch.device):
        self.slots, self.how, self.options = [slot], how, {"dtype": dtype, "device": device}

    def line(self, say: Say) -> str:
        return Call(torch.empty_strided, self.how, self.options, self.slots).line(say)


class Free(NamedTuple):
    """The release of an argument's memory."""

    slot: int
    slots: Sequence[int | None] = ()

    def line(self, say: Say) -> str:
        return f"t{self.slot}.untyped_storage().resize_(0)"


Step = Call | Allocate | Free


class Recording(NamedTuple):
    """Steps in order, over tensors by slot: the arguments, then the allocations."""

    steps: Sequence[tuple[Step, Sequence[int]]]  # each with the slots that nothing reads after it
    arguments: int  # number of slots that are arguments
    output: Any
    inside: dict[int, tuple[int, int]]  # slot without memory of its own -> the slot it lies in, bytes from its start


class Recorder(TorchDispatchMode):
    """Makes the recording: sees PyTorch's ops as a dispatch mode, and launches through `launch.run`, which calls it."""

    def __init__(self, args: tuple):
        super().__init__()
        self.args = args
        self.wholes: list[Any] = list(args)
        self.roots: dict[int, int] = {}  # storage -> slot, for allocations
        spans = [(a.data_ptr(), _extent(a), i) for i, a in enumerate(args) if isinstance(a, Tensor) and a.numel()]
        self.spans = sorted(spans)
        self.inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        self.refs: list[Ref] = []
        self.steps: list[Step] = []
        self.uses: list[set[int]] = []  # slots of each step
        self.overlap = any(a + size > b for (a, size, _), (b, _, _) in zip(self.spans, self.spans[1:]))
        self.trouble = ""
        self.alive: list[Any] = []  # keeps addresses from being reused

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, the default, imports torch._dynamo, which takes seconds

    def __enter__(self) -> "Recorder":
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
            self._add(Allocate(slot, (out.shape, out.stride()), out.dtype, out.device), {slot})
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
        except Unspeakable as error:
            self.trouble = f"{func}: {error}"
        else:
            slots = [None if self._known(t) else self._new(t) for t in results]
            self._add(Call(func, args, kwargs, slots, several), used | {s for s in slots if s is not None})

    def launched(self, direct: launch.Direct, values: list) -> None:
        """Record a kernel launch with these arguments."""
        self.alive.append(values)
        try:
            args = direct.arguments(values, self._place)
        except (Unspeakable, TypeError) as error:
            self.trouble = f"a launch: {error}"
        else:
            slots = {arg.slot for arg in args if isinstance(arg, launch.Pointer)}
            self._add(Call(direct.launch, direct.call(args), {}), slots)

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
        self._add(Call(once.counters, (t.device, count), {}, [slot]), {slot})

    def freed(self, t: Tensor) -> None:
        slots = [i for i, a in enumerate(self.args) if a is t]
        if slots:
            self._add(Free(slots[0]), {slots[0]})
        else:
            self.trouble = "freed memory that is no argument's"

    def recording(self, output: Any) -> Recording:
        """Return what was recorded, with such an output.

        Raises:
            Unspeakable: a program cannot express it.
        """
        if self.trouble:
            raise Unspeakable(self.trouble)
        kept: set[int] = set()
        output = self._refs(output, kept)
        self._shape(output)
        last = {slot: i for i, used in enumerate(self.uses) for slot in used}
        passing, unused = self._passing(last)
        starts, size = _packed(passing)
        common = len(self.wholes)  # the slot of all that passes
        steps: list[tuple[Step, list[int]]] = []
        if passing:
            device = self.wholes[next(iter(passing))].device
            steps.append((Allocate(common, ((size,), (1,)), torch.uint8, device), []))
        left_out = passing.keys() | unused
        for i, step in enumerate(self.steps):
            if not left_out.intersection(step.slots):
                released = [s for s in self.uses[i] if s >= len(self.args) and last[s] == i and s not in kept]
                steps.append((step, [s for s in released if s not in left_out]))
        inside = {slot: (common, start) for slot, start in starts.items()}
        return Recording(steps, len(self.args), output, inside)

    def _passing(self, last: dict[int, int]) -> tuple[dict[int, tuple[int, int, int]], set[int]]:
        """Return the allocations that only launches use, slot -> (first step, last step, bytes), and the slots of those
        that nothing uses.

        Args:
            last: slot -> the last step that uses it.
        """
        read = {ref.slot for ref in self.refs}  # as tensors
        passing, unused = {}, set()
        for i, step in enumerate(self.steps):
            slot = step.slots[0] if isinstance(step, Allocate) else None
            if slot is None or slot in read:
                continue
            size = _extent(self.wholes[slot])
            if last[slot] == i:
                unused.add(slot)
            elif 0 < size <= ALONE:
                passing[slot] = i, last[slot], size
        return passing, unused

    def _add(self, step: Step, used: set[int]) -> None:
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
        raise Unspeakable(f"a tensor {tuple(t.shape)} from elsewhere")

    def _ref(self, t: Tensor, used: set[int]) -> Ref:
        slot, ahead = self._place(t)
        used.add(slot)
        if t.dtype != self.wholes[slot].dtype:
            raise Unspeakable(f"a view of another dtype, {t.dtype}")
        self.refs.append(Ref(slot, ahead, t))
        return self.refs[-1]

    def _shape(self, output: Any) -> None:
        """Allocate results in their final shape, and note which tensors are all that a slot holds."""
        how = [isinstance(t, Tensor) and (t.shape, t.stride()) for t in self.wholes]
        allocations = {step.slots[0]: step for step in self.steps if isinstance(step, Allocate)}
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
