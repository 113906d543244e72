"""The plain call, model(x, t, y): without gradients, forward is captured as a CUDA graph once per shape and then
replayed, bit for bit the same, with nothing for the user to do.

A call replays, lets the GPU work, and meanwhile compares the network with what was captured: modules, their settings,
hooks, and where the weights lie. If anything differs, the result is dropped and the call runs as written. Weights that
change in place are read where they are, and what is derived from them is derived in the graph.
"""

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from uvit_fast.model import ops
from uvit_fast.runtime.graphs import CudaGraphs, Graphs, allowed, current, recording
from uvit_fast.runtime.hooks import Structure, hooked, hooked_everywhere

MOST = 8  # shapes kept
SHARE = 8  # captures may take 1 / SHARE of a device's budget
_PLAIN = (Tensor, nn.Parameter)
_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Sequential, nn.ModuleList, nn.Identity, nn.SiLU)
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, t, y, context


class Replayed(nn.Module):
    """A network whose `forward`, under `@replays`, is captured and replayed if no gradient is needed.

    It is a function of its tensors and of the network's weights and settings: no random numbers, no state.

    Attributes:
        cuda_graphs: False: each call runs uncaptured, as with UVIT_FAST_CUDA_GRAPHS=0 in the environment.
    """

    cuda_graphs = True

    @property
    def captures(self) -> "Captures":
        """This network's own captures; a copy of the network begins without any."""
        return self.__dict__.get("_captures") or self.__dict__.setdefault("_captures", Captures())

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:  # moves or casts all weights: .to, .half, .cpu
        self.captures.clear()
        return super()._apply(*args, **kwargs)


def replays(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make `forward` of a `Replayed` network a plain call that replays itself."""

    @functools.wraps(forward)
    def call(
        self: Replayed, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None, **cache: Any
    ) -> Tensor:
        if not cache and not torch.compiler.is_compiling() and self.cuda_graphs and allowed():
            output = self.captures.replay(self, forward, (x, t, y, context))
            if output is not None:
                return output
        return forward(self, x, t, y, context, **cache)

    return call


class _Capture(NamedTuple):
    inputs: list[Tensor]  # without those that are None
    replay: Callable[[], None]
    output: Tensor
    bytes: int
    structure: Structure
    held: object  # what it reads beside: a replay that came too late reads no other's memory


class Captures:
    """The captured calls of one network, neither copied nor pickled with it."""

    def __init__(self, graphs: Graphs | None = None):
        """graphs: what records and replays; default: CUDA graphs."""
        self.graphs: Graphs = CudaGraphs() if graphs is None else graphs
        self._lock = threading.RLock()
        self._kept: OrderedDict[tuple, _Capture] = OrderedDict()  # least recently used first
        self._calls: Counter[tuple] = Counter()  # calls that ran uncaptured, by kind
        self._derived = ops.Derived()  # from the weights, for all captures
        self._pool: Any = None  # of all captures: they never run at once
        self._last: tuple[Any, Any] | None = None  # the stream of the last replay, and an event after it

    def __reduce__(self) -> tuple:
        return Captures, ()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Memory held by the captures."""
        return self._derived.bytes + sum(capture.bytes for capture in self._kept.values())

    def clear(self) -> None:
        """Drop all captures and their memory."""
        with self._lock:
            if self._last is not None:
                self._last[1].synchronize()  # memory that a replay on another stream still reads must not be released
            self._kept.clear()
            self._calls.clear()
            self._pool = self._last = None
            self._derived = ops.Derived()

    def replay(self, network: nn.Module, forward: Callable[..., Tensor], inputs: Inputs) -> Tensor | None:
        """Return forward(network, *inputs), the caller's own, or None if the call must run as written."""
        if not self._may(network, inputs):
            return None
        key = (_surroundings(inputs[0].device), *map(_kind, inputs))
        with self._lock:
            capture = self._kept.get(key)
            if capture is None:
                if len(self._calls) > 100 * MOST:  # every call has another shape
                    self._calls.clear()
                self._calls[key] += 1
                seen = self._calls[key]
                if seen == 1 and capturable(network):
                    # twice: a capture launches early what reads weights that it has met
                    ops.compile_ahead(inputs[0].device, network, lambda: [forward(network, *inputs) for _ in range(2)])
                # Not at once, and ever more rarely if it fails: a shape that occurs once is not worth it.
                if seen < 2 or seen & (seen - 1) or not self._capture(key, network, forward, inputs):
                    return None
                capture = self._kept[key]
            self._kept.move_to_end(key)
            output = self._run(capture, inputs)
            if capture.structure.stands(network):
                return output
            if not capture.structure.hooked():
                self.clear()
            return None

    def _may(self, network: nn.Module, inputs: Inputs) -> bool:
        """Return whether this call has plain tensors, needs no gradient, and is neither watched nor recorded."""
        if torch.is_grad_enabled() and any(
            p.requires_grad for p in chain(network.parameters(), inputs) if p is not None
        ):
            return False
        x = inputs[0]
        if not all(v is None or type(v) in _PLAIN for v in inputs) or x is None or not x.numel():
            return False
        if self.graphs.why_not(x.device) or recording or "_is_replica" in network.__dict__:  # DataParallel's
            return False
        watched = is_in_torch_dispatch_mode() or torch._C._functorch.peek_interpreter_stack() is not None
        if watched or ops.forward_mode() or torch.jit.is_tracing():
            return False
        return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()

    def _run(self, capture: _Capture, inputs: Inputs) -> Tensor:
        """Replay on the current stream, after any replay on another one."""
        device = inputs[0].device
        if device.type != "cuda":
            return _fill(capture, inputs)
        with current(device):
            stream = torch.cuda.current_stream(device)
            if self._last is None:
                self._last = stream, torch.cuda.Event()
            elif self._last[0] != stream:
                stream.wait_event(self._last[1])
                self._last = stream, self._last[1]
            output = _fill(capture, inputs)
            self._last[1].record(stream)
        return output

    def _capture(self, key: tuple, network: nn.Module, forward: Callable[..., Tensor], inputs: Inputs) -> bool:
        """Record forward for inputs of this kind and keep it; return False if that fails, or takes too much memory."""
        made = self._record(network, forward, inputs) if capturable(network) else None
        room = self.graphs.budget(inputs[0].device) // SHARE
        if made is None or self.bytes + made.bytes > room or not self._derived.follows(network.parameters()):
            if made is not None and self._kept:
                self.clear()
            if not self._kept:
                self._derived = ops.Derived()
            return False
        while len(self._kept) >= MOST:
            self._kept.popitem(last=False)
        self._kept[key] = made
        return True

    def _record(self, network: nn.Module, forward: Callable[..., Tensor], inputs: Inputs) -> _Capture | None:
        """Return a recording of forward, or None if it cannot be recorded."""
        device = inputs[0].device
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        with torch.inference_mode(False), torch.no_grad(), current(device), recording():
            own = tuple(None if v is None else torch.empty_like(v).copy_(v) for v in inputs)

            def run() -> Tensor:
                # autocast's cache would pass weights to the graph that it casts, keeps, and frees
                with torch.autocast(device.type, dtype, enabled, cache_enabled=False):
                    return forward(network, *own)

            self._pool = self._pool or self.graphs.pool()
            try:
                with self._derived.open() as derived:
                    self.graphs.warm_up(run)
                    refresh = self._derived.refresh(derived)
                    self.graphs.warm_up(refresh)
                    replay, output, held = self.graphs.capture(lambda: (refresh(), run())[1], self._pool)
            except RuntimeError:  # the call as written says what is wrong, if anything is
                return None
        held += sum(v.nbytes for v in own if v is not None)
        structure = Structure(network)
        reads = derived, refresh, [weight.detach() for weight in structure.weights]
        return _Capture([v for v in own if v is not None], replay, output, held, structure, reads)


def _fill(capture: _Capture, inputs: Inputs) -> Tensor:
    torch._foreach_copy_(capture.inputs, [value for value in inputs if value is not None])
    capture.replay()
    return capture.output.clone()


def _kind(value: Tensor | None) -> tuple | None:
    return value if value is None else (value.shape, value.dtype, value.device, value.dim() > 1 and value.stride())


def _surroundings(device: torch.device) -> tuple:
    """Return what, beside its arguments, decides which kernels a call runs."""
    cudnn: Any = torch.backends.cudnn
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        ops.architecture(device),
    )


def capturable(network: nn.Module) -> bool:
    """Return whether calling the network runs only our forward, PyTorch's layers and plain weights."""
    if hooked_everywhere():
        return False
    for module in network.modules():
        if module is network:  # its own hooks run outside its forward
            continue
        kind = type(module)
        if kind not in _LAYERS and kind.__module__.partition(".")[0] != "uvit_fast":
            return False
        if hooked(module) or module.__dict__.get("_compiled_call_impl") is not None:
            return False
    return all(type(w) in _PLAIN and w.layout == torch.strided for w in chain(network.parameters(), network.buffers()))
