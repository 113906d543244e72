"""A network's forward and backward as CUDA graphs: the host launches a few graphs per step instead of thousands of
kernels.

Gradients reach the parameters through autograd as usual, so hooks on them (DeepSpeed's reduction, accumulation) need no
change. The backward may be cut into parts, a graph each: the gradients of the last blocks are then reduced while those
of earlier blocks are computed.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from uvit_fast.runtime.graphs import CudaGraphs, Graphs
from uvit_fast.runtime.hooks import changed


class Captured:
    """network.forward, captured at its first call that needs gradients and replayed from then on, bit for bit the same;
    with several parts, up to the order in which a tensor's gradients from different parts are added.

    Inputs and frozen weights get no gradients, and parts of the backward that lead to nothing else are left out.
    Another input shape, or weights that moved, are captured anew; what cannot be captured runs uncaptured, after one
    warning that says why, and so does a network with hooks or foreign modules inside. Memory: the peak of the
    uncaptured step, held all the time.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: int = 1,
        keep_gradients: bool = False,
        graphs: Graphs | None = None,
        agree: Callable[[bool], bool] = bool,
    ):
        """
        Args:
            network: its class defines `block_class` if parts > 1, and its blocks pass tensors as positional arguments.
            parts: number of graphs of the backward.
            keep_gradients: whether a parameter's `grad` may outlive the next backward, as in accumulation.
            graphs: what records and replays; default: CUDA graphs.
            agree: agree(recorded here) -> recorded on all ranks. Either all ranks replay or none: gradients arrive in a
                different order than uncaptured, and ranks reduce them as they arrive.
        """
        self.network, self.forward, self.keep_gradients = network, network.forward, keep_gradients
        self.agree = agree
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.blocks = (
            [m for m in network.modules() if isinstance(m, cast(type, network.block_class))] if parts > 1 else []
        )
        self.parts = min(parts, max(len(self.blocks), 1))
        self.graphs: Graphs = CudaGraphs() if graphs is None else graphs
        self.recorded: _Recorded | None = None
        self.refused, self.calls = False, 0

    def __call__(self, *inputs: Tensor, **conditions: Tensor) -> Tensor:
        if self.refused or not torch.is_grad_enabled():
            return self.forward(*inputs, **conditions)
        given = [*inputs, *conditions.values()]
        key = (len(inputs), *conditions, *((v.shape, v.dtype, v.device) for v in given))
        key += tuple(p.data_ptr() for p in self.network.parameters())
        module = changed(self.network, inside=True)
        if module and self.recorded is not None:
            raise RuntimeError(
                f"captured network: {module}, and a replay does not run it; expected changes before the first step, "
                "or train.cuda_graphs=false"
            )
        if self.recorded is None or self.recorded.key != key:
            self.forget()  # to free its memory first
            why = module or self._try_to_record(key, inputs, conditions)
            if not self.agree(why is None):
                self.forget()  # frees all that the attempt held
                self.refused, why = True, why or "it cannot be captured on another rank"
                warnings.warn(f"training runs uncaptured: {why}", RuntimeWarning, stacklevel=2)
                return self.forward(*inputs, **conditions)
        recorded = self.recorded
        assert recorded is not None
        for buffer, value in zip(recorded.inputs, given):
            buffer.copy_(value)
        recorded.replay()
        self.calls += 1
        output = recorded.output.clone()
        for part in recorded.parts:  # the last one's backward runs first
            output = _Part.apply(self, part, output, *part.parameters)
        return output

    def forget(self) -> None:
        """Drop the recording: the next call records what the network computes by then."""
        self.recorded = None

    def _try_to_record(self, key: tuple, inputs: tuple[Tensor, ...], conditions: dict[str, Tensor]) -> str | None:
        """Record; return why it failed, or None."""
        try:
            with _standing_in(self.network, self.parameters) as leaves:
                self.recorded = self._record(key, inputs, conditions, leaves)
        except RuntimeError as error:
            return str(error).strip().split("\n")[0]
        return None

    def _record(
        self, key: tuple, inputs: tuple[Tensor, ...], conditions: dict[str, Tensor], leaves: list[Tensor]
    ) -> "_Recorded":
        inputs = tuple(v.clone() for v in inputs)
        conditions = {name: v.clone() for name, v in conditions.items()}
        own: list[list[int]] = []  # for each part, the indices of the parameters whose gradients it computes
        cuts = _Cuts(self.blocks, self.parts)

        def forward() -> Tensor:
            with cuts:
                return self.forward(*inputs, **conditions)

        def rehearse() -> None:
            output = forward()
            backward = cuts.backward(output, torch.zeros_like(output))
            for _ in range(self.parts):
                found = backward(leaves)
                own.insert(0, [i for i, g in enumerate(found) if g is not None])

        self.graphs.warm_up(rehearse)
        assert len({i for part in own for i in part}) == sum(map(len, own)), "a parameter belongs to two parts"
        pool = self.graphs.pool()
        replay, output, _ = self.graphs.capture(forward, pool)
        grad_output = torch.zeros_like(output)
        backward = cuts.backward(output, grad_output)
        parts: list[_Backward] = []
        first = next(k for k, indices in enumerate(own) if indices)  # nothing before it is trainable
        for indices in reversed(own[first:]):
            again, gradients, _ = self.graphs.capture(partial(backward, [leaves[i] for i in indices]), pool)
            parameters = [self.parameters[i] for i in indices]
            parts.insert(0, _Backward(parameters, again, gradients, None if parts else grad_output))
        return _Recorded(key, [*inputs, *conditions.values()], replay, output.detach(), parts)


@contextlib.contextmanager
def _standing_in(network: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Replace the parameters by leaves that share their memory, and yield those in order.

    A hook on a parameter's gradient keeps its accumulator alive, which belongs to the stream on which it was made:
    autograd would make that stream wait for the capturing one.
    """
    leaves = {id(p): nn.Parameter(p.detach()) for p in parameters}
    places = [
        (m._parameters, name, p) for m in network.modules() for name, p in m._parameters.items() if id(p) in leaves
    ]
    for held, name, p in places:
        held[name] = leaves[id(p)]
    try:
        yield list(leaves.values())
    finally:
        for held, name, p in places:
            held[name] = p


class _Backward(NamedTuple):
    """One part of the backward."""

    parameters: Sequence[Tensor]  # whose gradients it computes
    replay: Callable[[], None]
    gradients: list[Tensor]  # filled by the replay
    grad_output: Tensor | None  # the last part's, which receives the output's gradient


class _Recorded(NamedTuple):
    """A forward, its backward, and what they read."""

    key: tuple
    inputs: list[Tensor]
    replay: Callable[[], None]
    output: Tensor
    parts: list[_Backward]


class _Part(torch.autograd.Function):
    """Pass on the output; the backward is one part's. A chain of them runs from the last part to the first."""

    @staticmethod
    def forward(ctx, captured: Captured, part: _Backward, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.captured, ctx.part, ctx.call = captured, part, captured.calls
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        captured, part = ctx.captured, ctx.part
        if ctx.call != captured.calls:
            raise RuntimeError(
                "captured network: expected one backward of a forward, before the next forward: "
                "either overwrites its activations"
            )
        ctx.call = None
        if part.grad_output is not None:
            part.grad_output.copy_(grad)
        part.replay()
        keep = captured.keep_gradients
        return None, None, grad, *(g.clone() if keep else g.detach() for g in part.gradients)


class _Cuts:
    """While open, blocks of different parts see each other's tensors as leaves, so that each part has its own backward.

    Take a network with two parts whose block 3 (in part 1) reads block 2's x and, over the long skip, block 0's (both
    in part 0): block 3 is given leaves in their place. Part 1's backward ends there; the leaves' gradients are where
    part 0's backward starts, at x and at the skip. A tensor with readers in several parts waits for all of their
    gradients, since later parts run first.
    """

    def __init__(self, blocks: list[nn.Module], parts: int):
        # The first part is half the size: nothing runs after its backward that could hide the reduction of its
        # gradients.
        self.part_of = {block: (i * (2 * parts - 1) // len(blocks) + 1) // 2 for i, block in enumerate(blocks)}
        self.parts = parts
        self.leaves: list[dict[int, tuple[Tensor, Tensor]]] = []  # for each part, id -> (tensor, leaf)
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self.leaves = [{} for _ in range(self.parts)]
        self.hooks = [block.register_forward_pre_hook(self._enter) for block in self.part_of]
        self.hooks += [block.register_forward_hook(self._leave) for block in self.part_of]

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _enter(self, block: nn.Module, args: tuple) -> tuple:
        part = self.part_of[block]
        return tuple(self._seen_from(part, v) if isinstance(v, Tensor) else v for v in args)

    def _leave(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        output.made_in = self.part_of[block]  # type: ignore[attr-defined]  # a note on the tensor

    def _seen_from(self, part: int, tensor: Tensor) -> Tensor:
        if _made_in(tensor) == part:
            return tensor
        leaves = self.leaves[part]
        if id(tensor) not in leaves:
            leaves[id(tensor)] = (tensor, tensor.detach().requires_grad_(tensor.requires_grad))
        return leaves[id(tensor)][1]

    def backward(self, output: Tensor, grad_output: Tensor) -> Callable[[list[Tensor]], list[Tensor | None]]:
        """Return a function to be called once per part, the last part first: it returns the gradients of the parameters
        that it is given.
        """
        # id -> (the part that made it, tensor, its gradient so far): where backwards start
        starts = {id(output): (self.parts - 1, output, grad_output)}
        leaves = self.leaves

        def backward(parameters: list[Tensor]) -> list[Tensor | None]:
            part, cut = len(leaves) - 1, leaves.pop()
            ours = [starts.pop(key) for key, (made_in, _, _) in list(starts.items()) if made_in == part]
            cut = {
                key: pair for key, pair in cut.items() if pair[1].requires_grad
            }  # the others lead to nothing trainable
            inputs = parameters + [leaf for _, leaf in cut.values()]
            if not ours or not inputs:
                return [None] * len(parameters)
            found = torch.autograd.grad([t for _, t, _ in ours], inputs, [g for _, _, g in ours], allow_unused=True)
            for (key, (tensor, _)), gradient in zip(cut.items(), found[len(parameters) :]):
                if gradient is not None:
                    total = starts[key][2] + gradient if key in starts else gradient
                    starts[key] = (_made_in(tensor), tensor, total)
            return list(found[: len(parameters)])

        return backward


def _made_in(tensor: Tensor) -> int:
    """Return the part whose block made the tensor; the first part for tensors from before the blocks."""
    return getattr(tensor, "made_in", 0)
