"""A fused op as PyTorch sees it: a `torch.library` op where something traces or intercepts ops, a plain function elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Op:
    """A differentiable op. Its library form serves torch.compile, fake tensors and dispatch modes; eager code skips the dispatcher,
    which takes the host as long as the launches.

    Args:
        name: of uvit_fast::<name>; the backward is uvit_fast::<name>_backward.
        forward, backward: the op on real tensors, with a schema's annotations; outputs never alias inputs.
        fake, fake_backward: empty tensors like their outputs.
        save: save(ctx, inputs, output), as in torch.autograd.Function.setup_context.
        gradient: gradient(ctx, backward, *grads) -> the gradients of the inputs, by a call of `backward`.
    """

    def __init__(
        self, name: str, forward: Callable, fake: Callable, backward: Callable, fake_backward: Callable, save: Callable, gradient: Callable
    ):  # fmt: skip
        library = torch.library.custom_op(f"uvit_fast::{name}", forward, mutates_args=())
        library_backward = torch.library.custom_op(f"uvit_fast::{name}_backward", backward, mutates_args=())
        library.register_fake(fake)
        library_backward.register_fake(fake_backward)
        library.register_autograd(lambda ctx, *grads: gradient(ctx, library_backward, *grads), setup_context=save)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):  # with a setup_context of its own it would inspect the signature at every call
                with eagerly():
                    output = forward(*args)
                save(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                return gradient(ctx, backward, *grads)

        self.forward, self.function = forward, Function
        self.library = getattr(torch.ops.uvit_fast, name).default

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _is_special(args[0]):
            return self.library(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self.function.apply(*args)
        with eagerly():
            return self.forward(*args)


_eager: ContextVar[bool] = ContextVar("eager", default=False)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """While open, an op's result reaches the next op as the object that it is: nothing traces, copies or reuses it."""
    token = _eager.set(True)
    try:
        yield
    finally:
        _eager.reset(token)


def runs_eagerly() -> bool:
    """Whether the op that runs was called in eager code."""
    return _eager.get()


def is_last_backward(gradient: Tensor) -> bool:
    """Whether the backward that runs, to which `gradient` came, may write over what its forward kept for it: nothing traces it, and
    no other one of the same forward can follow (retain_graph).
    """
    traced = torch.compiler.is_compiling() or _is_special(gradient)
    return not traced and not torch._C._autograd._get_current_graph_task_keep_graph()


def _is_special(x: Tensor) -> bool:
    """A fake tensor, say, which only the dispatcher knows what to do with."""
    return type(x) is not Tensor and type(x) is not torch.nn.Parameter


def empty(*like: Tensor) -> tuple[Tensor, ...]:
    """New contiguous tensors of these shapes: gradients in a fake backward."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)
