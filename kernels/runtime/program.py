"""An op's work on the host, recorded at its second call with tensors of a kind and replayed from then on.

An op's Python (checks, tiles, descriptors, keys) takes longer than its kernels run. It depends on shapes, dtypes and
alignments alone, so its outcome is a list: memory, launches with all arguments in place except the pointers, calls of
PyTorch. The recording is made while the op runs, so it needs no knowledge of the op. What it cannot express runs as
written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from uvit_fast.kernels.runtime import device as devices
from uvit_fast.kernels.runtime import launch
from uvit_fast.kernels.runtime.recorder import Recorder, Recording, Ref, Unspeakable
from uvit_fast.runtime.flags import Flag

MOST = 64  # kinds of tensors per op; ten programs serve a network and its training
_PLAIN = (Tensor, torch.nn.Parameter)
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
        recorder = Recorder(args)
        if recorder.overlap:  # whose memory would one in both be?
            return self.function(*args)
        with recorder:
            output = self.function(*args)
        try:
            self._known[kind] = Program(recorder.recording(output))
        except Unspeakable as error:
            self._never[kind] = str(error)
        return output


class Program:
    """A recording, written as the source of a function, since Python runs that in half the time of a loop over steps:
    t3 is the tensor in slot 3 and p3 its address.
    """

    def __init__(self, recording: Recording):
        steps, arguments, output, inside = recording
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
        if isinstance(value, Ref):
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
