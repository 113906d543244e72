"""A linear layer with the residual added in its epilogue: attention's output projection."""

import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import sums
from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import rows
from uvit_fast.kernels.runtime.op import Op, empty, learned, learns


def reference(a: Tensor, linear: Linear, x: Tensor) -> Tensor:
    """Return x + Linear(a): a (..., K), weight (D, K), x (..., D) -> (..., D)."""
    return x + F.linear(a, *linear)


def why_not(a: Tensor, linear: Linear, x: Tensor) -> str | None:
    """Return why the fused op cannot take these tensors, or None."""
    D, K = linear.weight.shape[0], a.shape[-1]
    return checks.why_not(a, linear=(linear, (D, K)), x=(x, (*a.shape[:-1], D))) or checks.narrow(D, 64)


def linear_residual(a: Tensor, linear: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the fused op: `reference` in one GEMM, which leaves the sums for the next LayerNorm.

    Args:
        a: (..., K), bf16 or fp16; every other tensor has its dtype.
        linear: weight (D, K).
        x: (..., D), the residual.

    Returns:
        (..., D), and its sums, see `layernorm.sums`.

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("linear_residual", why_not(a, linear, x))
    return run(a, linear, x)


def _forward(a: Tensor, linear: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    flat, written = rows(x), sums.new(x)
    linear = Linear(rows(linear.weight), linear.bias)
    y = gemm.core(a.device).linear(rows(a), linear, residual=flat, sums=written)  # (M, D)
    return y.view(x.shape), written


def _fake(a, linear, x):
    return x.new_empty(x.shape), sums.new(x)


def _backward(dy: Tensor, a: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    core, dy = gemm.core(a.device), rows(dy)
    da = core.input_gradient(dy, rows(weight)).view(a.shape)
    if not wanted:  # frozen
        return da, a.new_empty(0), a.new_empty(0)
    return da, *core.weight_gradient(dy, rows(a), bias=True)  # (D, K), (D,)


def _fake_backward(dy, a, weight, wanted):
    return empty(a)[0], *learned(wanted, weight, weight[:, 0])


def _save(ctx, inputs, output):
    a, linear, _ = inputs
    ctx.save_for_backward(a, linear.weight)


def _gradient(ctx, backward, dy):
    da, *layer = backward(dy, *ctx.saved_tensors, learns(ctx, 1))
    return da, tuple(layer), dy


run = _op = Op(
    "linear_residual",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
