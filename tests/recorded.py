"""A stand-in for CUDA graphs on a CPU: it records each tensor operation and replays it on the very same tensors.

So a replay sees new inputs only where they were copied into the recorded memory, and overwrites its last output, as a
graph does. A value read by the host breaks the recording, as it breaks a capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            raise RuntimeError("the host reads a value\nwhich the device has not computed")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordedGraphs:
    """`Graphs` for CPU tests.

    Attributes:
        captures: recordings made. held: bytes that each claims.
    """

    def __init__(self, held: int = 1000):
        self.captures, self.held = 0, held

    def why_not(self, device: torch.device) -> None:
        return None

    def budget(self, device: torch.device) -> int:
        return 1 << 40

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def pool(self) -> None:
        return None

    def capture(self, run: Callable[[], Any], pool: None = None) -> tuple[Callable[[], None], Any, int]:
        self.captures += 1
        with _Recorder() as recorder:
            output = run()
        for tensor in tree_leaves(output):
            tensor.detach().fill_(float("nan"))  # a recording computes nothing yet

        def replay() -> None:
            for func, args, kwargs, before in recorder.calls:
                after = func(*args, **kwargs)
                for a, b in zip(tree_leaves(before), tree_leaves(after)):
                    if isinstance(a, Tensor) and a.data_ptr() != b.data_ptr():
                        a.copy_(b)

        return replay, output, self.held
