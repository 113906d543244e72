"""A fused op as PyTorch sees it: a `torch.library` op where ops are traced, a plain function elsewhere."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.runtime.program import MOST, Programs

_FIELDS = {Norm: (Tensor, Tensor, float), Linear: (Tensor, Tensor | None)}  # in a schema


class Eager:
    """A differentiable function of tensors, layers and numbers for eager code, without the dispatcher, which takes the
    host as long as the launches.

    This is the one place where layers are taken apart: a schema, autograd and saved tensors know only single tensors.

    Args:
        forward: on real tensors, its arguments annotated as tensors, `Norm`, `Linear` and numbers. Its first return
            value is the result; the others have no gradient. Outputs never alias inputs.
        backward: takes single tensors and numbers.
        save: save(ctx, inputs, output), as in torch.autograd.Function.setup_context, with forward's arguments.
        gradient: gradient(ctx, backward, dy) -> the gradients of forward's arguments, layers as tuples, by `backward`.
        why_not: why_not(*forward's arguments) -> why it cannot run on them, or None; depends on nothing but
            `Programs.kind`. If there is a reason, a call returns None. Default: it always can.
        results: how many of forward's return values a call returns; the others are only saved. Default: all.
        twice: `gradient` returns one more at the end: another part of the first argument's gradient. Autograd adds it
            after the first part, so that with a third reader's gradient the sum has the bits of separate ops'.
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
        twice: bool = False,
    ):
        parameters = inspect.signature(forward).parameters.values()
        self._kinds = [p.annotation if p.annotation in _FIELDS else None for p in parameters]
        self.flat = _taken_apart(forward, self._together)
        self.programs = programs = Programs(self.flat)
        self.backwards = backwards = Programs(backward)
        self._why_not, self._can = why_not, {}
        self._twice = twice

        def setup(ctx: Any, inputs: tuple, output: Any) -> Any:
            ctx.set_materialize_grads(False)  # no zeros as gradients of what only the backward reads
            handed_on = output
            if isinstance(output, tuple):
                handed_on = output[:results]
                ctx.mark_non_differentiable(*handed_on[1:])
            save(ctx, self._together(inputs), output)
            return handed_on

        self.setup = setup

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):  # with a setup_context it would inspect the signature at every call
                *single, _, kind = args
                return setup(ctx, single, programs.follow(kind, single))

            @staticmethod
            def backward(ctx, dy, *_):
                if torch.is_grad_enabled():  # create_graph: what the kernels compute would count as constant
                    raise RuntimeError(
                        "gradients of gradients: the fused kernels have none; expected model.kernels=reference"
                    )
                given = _apart(gradient(ctx, backwards, dy))
                return (*given, None) if twice else (*given, None, None)

        self.function = Function

    def __call__(self, *args: Any) -> Any:
        single = _apart(args)
        kind = self.programs.kind(single)
        if self._why_not is not None and not self._can_run(kind, args):
            return None
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in single):
            return self.function.apply(*single, single[0] if self._twice else None, kind)
        return self.programs.follow(kind, single)

    def _can_run(self, kind: tuple | None, args: tuple) -> bool:
        can = self._can.get(kind)
        if can is None:
            if len(self._can) >= MOST:
                self._can.clear()
            can = self._can[kind] = kind is not None and self._why_not(*args) is None
        return can

    def _together(self, single: tuple) -> list:
        """Return `forward`'s arguments, from single tensors and numbers in order."""
        args, at = [], 0
        for kind in self._kinds:
            count = 1 if kind is None else len(kind._fields)
            args.append(single[at] if kind is None else kind(*single[at : at + count]))
            at += count
        return args


class Op(Eager):
    """A differentiable op. Its library form serves torch.compile, fake tensors and dispatch modes.

    Args:
        name: of uvit_fast::<name>; the backward is uvit_fast::<name>_backward.
        forward, backward, save, gradient: see `Eager`.
        fake: returns empty tensors like forward's outputs, for the same arguments; fake_backward: alike.
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

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            self.setup(ctx, inputs, output)

        library.register_autograd(lambda ctx, dy, *_: _apart(gradient(ctx, library_backward, dy)), setup_context=setup)
        self.library = getattr(torch.ops.uvit_fast, name).default

    def __call__(self, *args: Any) -> Any:
        return self.library(*_apart(args)) if is_watched(args[0]) else super().__call__(*args)


class Constant:
    """An op of single tensors and numbers whose result has no gradient, with `Op`'s two forms.

    Args:
        name, forward, fake: see `Op`.
    """

    def __init__(self, name: str, *, forward: Callable, fake: Callable):
        self.programs = Programs(forward)
        self.library = torch.library.custom_op(f"uvit_fast::{name}", forward, mutates_args=())
        self.library.register_fake(fake)

    def __call__(self, *args: Any) -> Any:
        return (self.library if is_watched(args[0]) else self.programs)(*args)


def _apart(args: tuple) -> tuple:
    single = []
    for a in args:
        if isinstance(a, tuple):
            single.extend(a)
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
    return torch._C._functorch.peek_interpreter_stack() is not None  # vmap


def _is_special(x: Tensor) -> bool:
    """Return whether only the dispatcher can handle x, for example a fake tensor."""
    return type(x) is not Tensor and type(x) is not torch.nn.Parameter


def empty(*like: Tensor) -> tuple[Tensor, ...]:
    """Return new contiguous tensors of these shapes: gradients in a fake backward."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)
