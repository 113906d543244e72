"""A fused op as PyTorch sees it: a `torch.library` op where ops are traced, a plain function elsewhere."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.runtime.program import MOST, Programs

_FIELDS = {Norm: (Tensor, Tensor, float), Linear: (Tensor, Tensor | None)}  # in a schema


class Eager:
    """A differentiable function of tensors, layers and numbers, for eager code.

    This is the one place where layers are taken apart: a schema, autograd and saved tensors know only single tensors.

    Args:
        forward: on real tensors, its arguments annotated as tensors, `Norm`, `Linear`, tuples of such layers, and
            numbers. Its first return value is the result; the others have no gradient. Outputs never alias inputs.
        backward: takes single tensors and numbers.
        save: save(ctx, inputs, output), as in torch.autograd.Function.setup_context, with forward's arguments.
        gradient: gradient(ctx, backward, dy) -> the gradients of forward's arguments, layers as tuples, by `backward`.
        why_not: why it cannot run on forward's arguments, or None; depends only on their `Programs.kind`. If there is a
            reason, a call returns None.
        results: how many of forward's return values a call returns; the others are only saved. Default: all.
    """

    def __init__(
        self,
        *,
        forward: Callable,
        backward: Callable,
        save: Callable,
        gradient: Callable,
        why_not: Callable | None = None,
        results: int | None = None,
    ):
        parameters = inspect.signature(forward).parameters.values()
        self._kinds = [_taken(p.annotation) for p in parameters]
        self.flat = flat = _taken_apart(forward, self._together)
        self.programs = programs = Programs(flat)
        self.backwards = backwards = Programs(backward)
        self.why_not, self._fit = why_not, {}

        def setup(ctx: Any, inputs: tuple, output: Any) -> Any:
            ctx.set_materialize_grads(False)  # no zeros as gradients of what only the backward reads
            handed_on = output[:results] if isinstance(output, tuple) else output
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*handed_on[1:])
            save(ctx, self._together(inputs), output)
            return handed_on

        self._setup = setup

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                # with a setup_context it would inspect the signature at every call
                single, kind = args[:-1], args[-1]
                return setup(ctx, single, programs.follow(kind, single))

            @staticmethod
            def backward(ctx, dy, *_):
                return *_apart(gradient(ctx, backward if torch.is_grad_enabled() else backwards, dy)), None

        self.function = Function

    def __call__(self, *args: Any) -> Any:
        single = _apart(args)
        kind = self.programs.kind(single)
        if self.why_not is not None and not self._fits(kind, args):
            return None
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in single):
            return self.function.apply(*single, kind)
        return self.programs.follow(kind, single)

    def _fits(self, kind: tuple | None, args: tuple) -> bool:
        fits = self._fit.get(kind)
        if fits is None:
            if len(self._fit) >= MOST:
                self._fit.clear()
            fits = self._fit[kind] = kind is not None and self.why_not(*args) is None
        return fits

    def _together(self, single: tuple) -> list:
        """Return `forward`'s arguments, from single tensors and numbers in order."""
        left = iter(single)
        return [next(left) if kind is None else _gathered(kind, left) for kind in self._kinds]


class Op(Eager):
    """A differentiable op. Its library form serves torch.compile, fake tensors and dispatch modes.

    Eager code skips the dispatcher, which takes the host as long as the launches.

    Args:
        name: of uvit_fast::<name>; the backward is uvit_fast::<name>_backward.
        forward, backward, save, gradient: see `Eager`.
        fake, fake_backward: return empty tensors like the outputs, for the same arguments.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable,
        fake: Callable,
        backward: Callable,
        fake_backward: Callable,
        save: Callable,
        gradient: Callable,
    ):
        super().__init__(forward=forward, backward=backward, save=save, gradient=gradient)
        self.forward = forward
        library = torch.library.custom_op(f"uvit_fast::{name}", self.flat, mutates_args=())
        library_backward = torch.library.custom_op(f"uvit_fast::{name}_backward", backward, mutates_args=())
        library.register_fake(lambda *args: fake(*self._together(args)))
        library_backward.register_fake(fake_backward)
        library.register_autograd(
            lambda ctx, dy, *_: _apart(gradient(ctx, library_backward, dy)), setup_context=self._setup
        )
        self.library = getattr(torch.ops.uvit_fast, name).default

    def __call__(self, *args: Any) -> Any:
        if is_watched(args[0]):
            return self.library(*_apart(args))
        return super().__call__(*args)


class _Tuple(NamedTuple):
    """How a layer, or a tuple of layers, is composed of single tensors and numbers."""

    made: type
    parts: list["_Tuple | None"]  # None: single


def _taken(annotation: Any) -> _Tuple | None:
    """Return how an argument with this annotation is taken apart, or None if it is single."""
    if not hasattr(annotation, "_fields"):
        return None
    return _Tuple(annotation, [_taken(part) for part in get_type_hints(annotation).values()])


def _gathered(kind: _Tuple, left: Iterator) -> tuple:
    return kind.made(*[next(left) if part is None else _gathered(part, left) for part in kind.parts])


def _apart(args: tuple) -> tuple:
    single: list[Any] = []
    for a in args:
        if isinstance(a, tuple):
            single.extend(_apart(a))
        else:
            single.append(a)
    return tuple(single)


def _taken_apart(forward: Callable, together: Callable) -> Callable:
    """Return `forward` on single tensors and numbers, with the signature from which a schema is read."""

    def flat(*args: Any) -> Any:
        return forward(*together(args))

    signature, single = inspect.signature(forward), []
    for p in signature.parameters.values():
        if p.annotation in _FIELDS:
            for field, kind in zip(p.annotation._fields, _FIELDS[p.annotation]):
                single.append(p.replace(name=f"{p.name}_{field}", annotation=kind))
        else:
            single.append(p)
    flat.__signature__ = signature.replace(parameters=single)
    flat.__annotations__ = {p.name: p.annotation for p in single} | {"return": signature.return_annotation}
    return flat


def wants_gradient(*args: Any) -> bool:
    """Return whether autograd is on and one of these tensors or layers requires a gradient."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in _apart(args))


def learns(ctx: Any, at: int) -> bool:
    """Return whether a backward needs the gradient of a linear layer, whose weight is argument `at`, and its bias the
    next one, counted in single tensors.
    """
    return any(ctx.needs_input_grad[at : at + 2])


def learned(wanted: bool, *like: Tensor) -> tuple[Tensor, ...]:
    """Return a fake backward's result for weights: gradients, or empty tensors if none are needed."""
    return empty(*like) if wanted else tuple(t.new_empty(0) for t in like)


def is_last_backward(gradient: Tensor) -> bool:
    """Return whether the current backward, which received `gradient`, may overwrite what its forward saved.

    It may if nothing traces it and no other backward of the same forward can follow (retain_graph).
    """
    traced = torch.compiler.is_compiling() or _is_special(gradient)
    return not traced and not torch._C._autograd._get_current_graph_task_keep_graph()


def is_watched(x: Tensor) -> bool:
    """Return whether x, or what is done with it, is traced, transformed or watched: only the dispatcher can do that."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _is_special(x):
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_special(x: Tensor) -> bool:
    """Return whether only the dispatcher can handle x, for example a fake tensor."""
    return type(x) is not Tensor and type(x) is not torch.nn.Parameter


def empty(*like: Tensor) -> tuple[Tensor, ...]:
    """Return new contiguous tensors of these shapes: gradients in a fake backward."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)
