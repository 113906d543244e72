"""The fused linear ops with arguments of any shape, for the interpreter and for GPUs, and what a result is held to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops import linear_residual, ln_linear, ln_mlp, proj_ln_mlp, skip_linear

OPS = {
    "ln_linear": (ln_linear.ln_linear, ln_linear.reference),
    "ln_linear_bias": (ln_linear.ln_linear, ln_linear.reference),
    "ln_linear_narrow": (ln_linear.ln_linear, ln_linear.reference),
    "ln_mlp": (ln_mlp.ln_mlp, ln_mlp.reference),
    "proj_ln_mlp": (proj_ln_mlp.proj_ln_mlp, proj_ln_mlp.reference),
    "skip_linear": (skip_linear.skip_linear, skip_linear.reference),
    "linear_residual": (linear_residual.linear_residual, linear_residual.reference),
}
WITH_SUMS = ["linear_residual", "skip_linear", "proj_ln_mlp", "ln_mlp"]


def arguments(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.3, device: str = "cpu", grad: bool = False
) -> list[Any]:
    """The op's arguments: activations of this mean and deviation 1, weights that keep the deviation."""
    D = shape[-1]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def linear(N: int, K: int, bias: bool = True) -> Linear:
        return Linear(random(N, K) * K**-0.5, random(N) if bias else None)

    x, norm, fc1, fc2 = (
        random(*shape) + mean,
        Norm(1 + 0.1 * random(D), 0.1 * random(D)),
        linear(4 * D, D),
        linear(D, 4 * D),
    )
    made = {
        "ln_linear": lambda: [x, norm, linear(3 * D, D, bias=False)],
        "ln_linear_bias": lambda: [x, norm, linear(D, D)],
        "ln_linear_narrow": lambda: [x, norm, linear(16, D)],  # the last layer's width
        "ln_mlp": lambda: [x, norm, fc1, fc2],
        "proj_ln_mlp": lambda: [random(*shape), linear(D, D), x, norm, fc1, fc2],
        "skip_linear": lambda: [x, random(*shape), linear(D, 2 * D)],
        "linear_residual": lambda: [random(*shape), linear(D, D), x],
    }[name]()
    return with_tensors(lambda t: t.to(dtype).requires_grad_(grad), made)


def with_tensors(change: Callable[[Tensor], Tensor], args: list[Any]) -> list[Any]:
    """The same arguments with every tensor changed."""
    return tree_map_only(Tensor, change, args)


def tensors(args: list[Any]) -> list[Tensor]:
    """The tensors of an op's arguments, in their order."""
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def result(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What an op returns, without what it leaves for the next one."""
    return returned[0] if isinstance(returned, tuple) else returned


def results_and_gradients(op: Callable, args: list[Any], dy: Tensor) -> list[Tensor]:
    """The result, and the gradient of every tensor among the arguments."""
    y = result(op(*args))
    return [y.detach(), *torch.autograd.grad(y, tensors(args), dy.to(y.dtype))]


def compare(op: Callable, reference: Callable, args: list[Any], tolerance: float) -> None:
    """Forward and every gradient of `op` against `reference` in float64, relative to each result's norm."""
    ours = with_tensors(lambda t: t.detach().requires_grad_(), args)
    exact = with_tensors(lambda t: t.detach().double().requires_grad_(), args)
    dy = torch.randn_like(result(op(*ours)).detach())
    pairs = zip(results_and_gradients(op, ours, dy), results_and_gradients(reference, exact, dy))
    for i, (a, b) in enumerate(pairs):
        assert a.shape == b.shape and a.dtype == dy.dtype
        error = (a.double() - b).norm() / b.norm()
        assert error <= tolerance, f"result {i} is off by {error:.1e} of its norm, allowed {tolerance:.1e}"
