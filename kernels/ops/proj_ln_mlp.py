"""The rest of a block after its attention, projection and MLP, with less kept for the backward."""

import torch
from torch import Tensor

from uvit_fast.kernels.ops import linear_residual, ln_mlp
from uvit_fast.kernels.runtime.op import Op, eagerly, empty, is_last_backward


def reference(
    a: Tensor, weight: Tensor, bias: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
) -> Tensor:  # fmt: skip
    """m + MLP(LayerNorm(m)) of m = x + Linear(a): a (..., K), weight (D, K), x (..., D) -> (..., D)."""
    return ln_mlp.reference(linear_residual.reference(a, weight, bias, x), gamma, beta, w1, b1, w2, b2, eps)


def why_not(
    a: Tensor, weight: Tensor, bias: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
) -> str | None:  # fmt: skip
    """Why the fused op cannot take these tensors; None where it can."""
    first = linear_residual.why_not(a, weight, bias, x)
    return first or ln_mlp.why_not(x, gamma, beta, w1, b1, w2, b2, eps)


def proj_ln_mlp(
    a: Tensor, weight: Tensor, bias: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
) -> Tensor:  # fmt: skip
    """`linear_residual`, then `ln_mlp`, with what is between them computed again in the backward.

    The projection is the cheapest GEMM of a block: D values a token less for 2% of its time. Saves a, x, the fp32 statistics and half
    the GELU's argument.

    Args:
        a: (..., K), bf16 or fp16, the attention's output; every other tensor has its dtype.
        weight: (D, K), bias: (D,), x: (..., D).
        gamma, beta, w1, b1, w2, b2: as for `ln_mlp`.

    Returns:
        (..., D).

    Raises:
        ValueError: with the sentence of `why_not`.
    """
    reason = why_not(a, weight, bias, x, gamma, beta, w1, b1, w2, b2, eps)
    if reason:
        raise ValueError(f"proj_ln_mlp: {reason}")
    tensors = (a, weight, bias, x, gamma, beta, w1, b1, w2, b2)
    return _op(*tensors, eps, torch.is_grad_enabled() and any(t.requires_grad for t in tensors))[0]


def _forward(
    a: Tensor, weight: Tensor, bias: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with eagerly():  # whatever called: the middle stays in here
        middle = linear_residual._forward(a, weight, bias, x)
    return ln_mlp.compute(middle, gamma, beta, w1, b1, w2, b2, eps, save, overwrite=True)


def _fake(a, weight, bias, x, *rest):
    return ln_mlp._fake(x, *rest)


def _backward(
    dy: Tensor, a: Tensor, weight: Tensor, bias: Tensor, x: Tensor, stats: Tensor, h: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, w2: Tensor, last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    middle = linear_residual._forward(a, weight, bias, x)
    dx, *rest = ln_mlp._backward(dy, middle, stats, h, gamma, beta, w1, w2, last)
    return *linear_residual._backward(dx, a, weight), dx, *rest


def _fake_backward(dy, a, weight, bias, x, stats, h, gamma, beta, w1, w2, last):
    return *empty(a, weight, bias), *ln_mlp._fake_backward(dy, x, stats, h, gamma, beta, w1, w2, last)


def _save(ctx, inputs, output):
    a, weight, bias, x, gamma, beta, w1, _, w2 = inputs[:9]
    ctx.set_materialize_grads(False)  # no zeros for the gradients of what only the backward reads
    ctx.save_for_backward(a, weight, bias, x, output[1], output[2], gamma, beta, w1, w2)


def _gradient(ctx, backward, dy, *_):
    return *backward(dy, *ctx.saved_tensors, is_last_backward(dy)), None, None


_op = Op("proj_ln_mlp", _forward, _fake, _backward, _fake_backward, _save, _gradient)
