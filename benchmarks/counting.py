"""Count what a piece of code launches, and where it makes the host wait: op by op, without a GPU.

The meta device stands in for one: it has shapes and dtypes but no values, and whatever asks for a value is a wait. The
bodies of the fused ops run as on a GPU, down to the launch of each Triton kernel, which is counted instead.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from uvit_fast.diffusion import stages
from uvit_fast.kernels.runtime import device

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
WAITS = [  # waits that are not ops
    (torch.cuda, "synchronize"),
    (torch.cuda.Event, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
]


class Counts(TorchDispatchMode):
    """Count launches and waits of the code inside `with`.

    Attributes:
        launches: count by op or kernel; an op of PyTorch counts as one, whatever it does inside. Views and allocations
            do not count.
        waits: "file:line: what" of each place where the host waits for the device, with its count.
    """

    def __init__(self):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._patches = contextlib.ExitStack()
        self._made: list[tuple[StorageWeakRef, int]] = []  # memory that ops allocated, and its bytes

    def alive(self) -> int:
        """Return the bytes that the ops allocated and that are still held: after a forward, what waits for the
        backward.
        """
        return sum({ref.cdata: size for ref, size in self._made if not ref.expired()}.values())

    def __enter__(self) -> "Counts":
        self._patches.enter_context(_Uploads(self))
        for owner, name in WAITS:
            if not isinstance(owner, type) or name in vars(owner):
                self._patches.enter_context(mock.patch.object(owner, name, lambda *_, n=name: self.wait(n)))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.close()

    def wait(self, what: str) -> None:
        self.waits[f"{_where()}: {what}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        if func.namespace == "uvit_fast":  # run the op's body, not its stand-in for the meta device
            with self._again():
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        if func.namespace == "aten" and name not in READS:
            with self._again(), torch._C.DisableTorchFunction():  # otherwise it would call the op itself again
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if (answer := self._read(name, func, inputs, kwargs)) is not None:
            return answer
        result = func(*args, **kwargs)
        fresh = _fresh(result, inputs)
        self._made += [(StorageWeakRef(storage), storage.nbytes()) for storage in fresh]
        if name not in ALLOCATIONS and (func._schema.is_mutable or fresh):
            self.launches[func.name()] += 1
        return result

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Enter this mode again, for what the current op calls."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _read(self, name: str, func, inputs: list[Tensor], kwargs: dict):
        """Record a wait; on the meta device also answer in place of the missing value."""
        meta = any(t.device.type == "meta" for t in inputs)
        masked = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in inputs[1:])
        if name in READS or masked:
            self.wait(name)
            answers = {"_local_scalar_dense": 1.0, "is_nonzero": True, "equal": True}
            return answers.get(name, inputs[0]) if meta else None
        moved = kwargs.get("device") or (inputs[0].device if name == "copy_" else None)
        sources = inputs[1:] if name == "copy_" else inputs
        if name in ("_to_copy", "copy_") and sources and moved is not None:
            devices = torch.device(moved).type, sources[0].device.type
            if devices == ("cpu", "meta"):
                self.wait("copy to the host")
                return inputs[0] if name == "copy_" else torch.zeros(sources[0].shape, dtype=kwargs.get("dtype"))
            if devices == ("meta", "cpu") and not kwargs.get("non_blocking"):
                self.wait("copy from pageable memory")
        return None


class _Uploads(TorchFunctionMode):
    """Catch torch.tensor(number, device=...), which copies from the host out of the dispatcher's sight."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not (args and isinstance(args[0], Tensor)):
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
                self.counts.wait(f"torch.{func.__name__} of a host's value")
        return func(*args, **kwargs)


def _fresh(result: object, inputs: list[Tensor]) -> list[torch.UntypedStorage]:
    """Return the memory of a result that no input held."""
    held = {t.untyped_storage()._cdata for t in inputs}
    results = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
    return [storage for storage in results if storage._cdata not in held]


def _where() -> str:
    """Return file:line of the innermost frame that is neither PyTorch's nor this file's."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        file = Path(frame.f_code.co_filename)
        if file != Path(__file__) and TORCH not in file.parents and file.name not in ("contextlib.py", "mock.py"):
            inside = ROOT in file.parents and ".venv" not in file.parts
            return f"{file.relative_to(ROOT) if inside else '/'.join(file.parts[-3:])}:{line}"
    return "unknown"


@contextlib.contextmanager
def hopper(counts: Counts | None = None) -> Iterator[None]:
    """Let meta tensors take the paths of an H100: the fused ops accept them, and kernels are counted where they would
    be launched.
    """

    def launched(self: JITFunction, *args: object, **kwargs: object) -> None:
        if counts is not None:
            counts.launches[f"triton:{self.__name__.strip('_')}"] += 1

    pretences = [
        (device, "_INTERPRETING", True),  # lets the ops accept tensors that are not on CUDA
        (stages, "why_not", lambda x: None),
        (device, "_FORCED", 90),
        (device, "_properties", lambda index: SimpleNamespace(multi_processor_count=132, major=9)),
        (JITFunction, "run", launched),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in pretences:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
