"""The whole sampling loop as one CUDA graph: every network evaluation, guidance, the solver's updates, the decoder.

A graph replays kernels on fixed addresses. So whatever changes between two calls (noise, labels or text, null
condition, scale, keys) is copied into the capture's own buffers; whatever shapes the loop (plan, image shape, guidance
or not, interval) is its key.
"""

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.diffusion.guidance import ALWAYS, EpsFn, Guidance
from uvit_fast.diffusion.stages import Sampler
from uvit_fast.model import ops
from uvit_fast.runtime.graphs import CudaGraphs, Graphs, current, recording
from uvit_fast.runtime.hooks import Structure, changed

Inputs = dict[str, Tensor]  # x_T, keys, scale, and "condition.<name>", "null.<name>"


@dataclass
class _Capture:
    """One recorded loop and everything it reads."""

    inputs: Inputs
    replay: Callable[[], None]
    output: Tensor
    bytes: int
    weights: tuple  # their addresses
    stands: Callable[[], bool]  # whether the model certainly is as it was
    tables: tuple[Tensor, Tensor]  # kept because their addresses were recorded


class GraphSampler:
    """Sample through captured loops, bit for bit as `sampler(eps_fn, x_T)` would.

    The first call of a kind captures, later ones replay: with another batch of at most the captured size, other labels
    or text, another scale. The least recently used captures are dropped to stay within `max_bytes`. What cannot be
    captured runs uncaptured, after one warning that says why, and so does a model with hooks or foreign modules such as
    adapters. For batches much smaller than a captured one, use another GraphSampler: padding costs what the full batch
    costs.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        decode: Callable[[Tensor], Tensor] | None = None,
        max_bytes: int | None = None,
        graphs: Graphs | None = None,
    ):
        """
        Args:
            model: model(x, t, **condition) -> eps, such as a UViT. Its weights may change in place between two calls;
                if they move, its loops are captured anew. Its other settings, such as a LayerNorm's eps, count as they
                were when a loop was captured: `clear` after a change. If it has `fixed_weights`, loops run within that.
            decode: x_0 (B, C, H, W) -> images, captured at the end of the loop.
            max_bytes: bound on the memory of all captures together; default: half of the device's.
            graphs: what records and replays; default: CUDA graphs.
        """
        self.model, self.decode, self.max_bytes = model, decode, max_bytes
        self.graphs: Graphs = CudaGraphs() if graphs is None else graphs
        self._captures: OrderedDict[tuple, _Capture] = OrderedDict()  # least recently used first
        self._refused: set[tuple | str] = set()  # kinds of calls, and changes found in the model

    @property
    def bytes(self) -> int:
        """Memory held by the captures: their pools and their input buffers."""
        return sum(capture.bytes for capture in self._captures.values())

    @property
    def captures(self) -> int:
        """How many loops are kept."""
        return len(self._captures)

    def clear(self) -> None:
        """Drop all captures."""
        self._captures.clear()
        self._refused.clear()

    def __call__(
        self,
        sampler: Sampler,
        x_T: Tensor,
        condition: dict[str, Tensor] | None = None,
        null: Mapping[str, Tensor | int | None] | None = None,
        scale: float = 0.0,
        interval: tuple[float, float] = ALWAYS,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Solve from x_T to x_0, and decode.

        Args:
            x_T: (B, C, H, W).
            condition, null, interval: as in `Guidance`; null and interval count only with guidance.
            scale: the paper's s; 0 runs one branch.
            keys: (B,) int64 from `sample_generators`, for samplers that draw noise; default: drawn from torch's CPU
                generator.

        Returns:
            (B, C, H, W) fp32, or `decode`'s result: the caller's own, no later call overwrites it.

        Raises:
            ValueError: an empty batch, or guidance without a condition or its null.
        """
        interval = (interval[0], interval[1]) if scale else ALWAYS
        with torch.no_grad(), current(x_T.device):
            inputs = self._inputs(sampler, x_T, condition or {}, null or {}, scale, keys)
            capture = self._find(sampler, inputs, interval)
            output = self._run(sampler, inputs, interval) if capture is None else _replay(capture, inputs)
        return output.clone()  # outside the graph's memory

    def prepare(
        self,
        sampler: Sampler,
        x_T: Tensor,
        condition: dict[str, Tensor] | None = None,
        null: Mapping[str, Tensor | int | None] | None = None,
        scale: float = 0.0,
        interval: tuple[float, float] = ALWAYS,
        keys: Tensor | None = None,
    ) -> bool:
        """Capture what a call with these arguments would replay, without sampling, for example before a service takes
        requests.

        Returns:
            Whether such a call replays; if it will not, a warning has said why.
        """
        with torch.no_grad(), current(x_T.device):
            inputs = self._inputs(sampler, x_T, condition or {}, null or {}, scale, keys)
            return self._find(sampler, inputs, (interval[0], interval[1]) if scale else ALWAYS) is not None

    def _inputs(self, sampler: Sampler, x_T: Tensor, condition, null, scale: float, keys: Tensor | None) -> Inputs:
        if len(x_T) == 0:
            raise ValueError(f"x_T: expected at least one sample, got {tuple(x_T.shape)}")
        if scale != 0 and not condition:
            raise ValueError(f"scale {scale}: guidance needs a condition")
        inputs = {"x_T": x_T} | {f"condition.{name}": value for name, value in condition.items()}
        if sampler.draws_noise:
            inputs["keys"] = torch.randint(-(2**63), 2**63 - 1, x_T.shape[:1]) if keys is None else keys
        if scale != 0:
            inputs["scale"] = torch.tensor(scale, dtype=torch.float32)
            for name, value in condition.items():
                if null.get(name) is None:
                    raise ValueError(f"guidance: expected a null value for {name}, got none")
                inputs[f"null.{name}"] = torch.as_tensor(null[name], dtype=value.dtype).expand(value.shape[1:])
        for name, value in inputs.items():
            if _batched(name) and len(value) != len(x_T):
                raise ValueError(f"{name}: expected {len(x_T)} rows, one per sample, got {tuple(value.shape)}")
        return {name: value.to(x_T.device, non_blocking=True) for name, value in inputs.items()}

    def _find(self, sampler: Sampler, inputs: Inputs, interval: tuple[float, float]) -> _Capture | None:
        """Return the capture that serves `inputs`, made if there is none, or None if they must run uncaptured."""
        device, batch = inputs["x_T"].device, len(inputs["x_T"])
        shapes = tuple((name, v.shape[1:] if _batched(name) else v.shape, v.dtype) for name, v in inputs.items())
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        kind = (tuple(sampler.stages), sampler.keep, shapes, interval, device, autocast)
        key = self._fitting(kind, batch)
        # Before a replay the GPU waits for what is compared here.
        if key not in self._captures or not self._captures[key].stands():
            if isinstance(self.model, nn.Module) and (why := changed(self.model)):
                self._refuse(why, f"{why}, and a replay would not run it")
                return None
            weights = tuple(p.data_ptr() for p in self.model.parameters()) if hasattr(self.model, "parameters") else ()
            for each in [k for k, c in self._captures.items() if c.weights != weights]:
                del self._captures[each]
            key = self._fitting(kind, batch)
            if {key, kind} & self._refused:
                return None
            if key in self._captures:
                self._captures[key].stands = _comparison(self.model)
            elif not self._capture(key, sampler, inputs, interval, weights):
                return None
        self._captures.move_to_end(key)
        return self._captures[key]

    def _fitting(self, kind: tuple, batch: int) -> tuple:
        """Return the key of the smallest capture for at least `batch` samples, or of one to be made."""
        fitting = [key for key in self._captures if key[:-1] == kind and key[-1] >= batch]
        return min(fitting, key=lambda key: key[-1], default=(*kind, batch))

    def _capture(self, key: tuple, sampler: Sampler, inputs: Inputs, interval, weights: tuple) -> bool:
        """Record and keep the loop for a batch of the size of `inputs`; if that fails, warn once and return False."""
        device, refused = inputs["x_T"].device, key[:-1]
        why = self.graphs.why_not(device)
        if why is None:
            buffers = {name: value.clone(memory_format=torch.contiguous_format) for name, value in inputs.items()}
            bound = self.graphs.budget(device) if self.max_bytes is None else self.max_bytes

            def run(loop: Callable[..., Tensor], sampler: Sampler) -> Tensor:
                # autocast's cache would pass weights to the capture that it casts, keeps, and frees
                dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
                with torch.autocast(device.type, dtype, enabled, cache_enabled=False):
                    return loop(sampler, buffers, interval)

            tables, short = sampler.tables(device), sampler.rehearsal(interval)  # a capture cannot copy from the host
            try:
                with recording():
                    model = self.model
                    if isinstance(model, nn.Module) and hasattr(model, "fixed_weights"):  # others have no such kernels
                        ops.compile_ahead(device, model, lambda: run(self._solve, short))
                    self.graphs.warm_up(lambda: run(self._run, short))
                    replay, output, held = self.graphs.capture(lambda: run(self._run, sampler))
            except RuntimeError as error:
                why = str(error).strip().split("\n")[0]
                if isinstance(error, torch.OutOfMemoryError):
                    refused = key  # a smaller batch may fit
            else:
                held += sum(value.nbytes for value in buffers.values())
                if held <= bound:
                    while self._captures and self.bytes + held > bound:
                        self._captures.popitem(last=False)
                    self._captures[key] = _Capture(
                        buffers, replay, output, held, weights, _comparison(self.model), tables
                    )
                    return True
                why, refused = f"its {held:,} bytes are over the bound of {bound:,}", key
        self._refuse(refused, why)
        return False

    def _refuse(self, what: tuple | str, why: str) -> None:
        """Warn once that it runs uncaptured."""
        if what not in self._refused:
            self._refused.add(what)
            warnings.warn(f"sampling runs uncaptured: {why}", RuntimeWarning, stacklevel=5)

    def _run(self, sampler: Sampler, inputs: Inputs, interval: tuple[float, float]) -> Tensor:
        """Run the loop itself, the same whether or not it is being captured."""
        x_0 = self._solve(sampler, inputs, interval)
        return x_0 if self.decode is None else self.decode(x_0)

    def _solve(self, sampler: Sampler, inputs: Inputs, interval: tuple[float, float]) -> Tensor:
        condition, null = (
            {name.removeprefix(kind): v for name, v in inputs.items() if name.startswith(kind)}
            for kind in ("condition.", "null.")
        )
        if "scale" in inputs:
            eps_fn: EpsFn = Guidance(self.model, condition, null, inputs["scale"], interval)
        else:
            eps_fn = partial(self.model, **condition)
        with getattr(self.model, "fixed_weights", contextlib.nullcontext)():
            return sampler(eps_fn, inputs["x_T"], generator=inputs.get("keys"))


def _comparison(model: Callable[..., Tensor]) -> Callable[[], bool]:
    """Return what tells in some tens of microseconds whether a model is still as it is now, if it is a module."""
    return partial(Structure(model, whole=True).stands, model) if isinstance(model, nn.Module) else lambda: False


def _replay(capture: _Capture, inputs: Inputs) -> Tensor:
    """Return the captured loop's output for `inputs`, in the graph's memory."""
    batch = len(inputs["x_T"])
    for name, value in inputs.items():
        buffer = capture.inputs[name]
        (buffer[:batch] if _batched(name) else buffer).copy_(value)  # padding keeps an earlier call's values
    capture.replay()
    return capture.output[:batch]


def _batched(name: str) -> bool:
    """Return whether an input has one row per sample."""
    return name in ("x_T", "keys") or name.startswith("condition.")


def on_a_gpu(model: nn.Module, decode: Callable[[Tensor], Tensor] | None = None) -> GraphSampler | None:
    """Return what replays loops of the model and decodes, or None if the model is not on a GPU."""
    return GraphSampler(model, decode) if next(model.parameters()).is_cuda else None
