"""The linear layer over concatenated skips, without the concatenation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import sums
from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import rows
from uvit_fast.kernels.runtime.op import Op, empty, learned, learns


def reference(x: Tensor, skip: Tensor, linear: Linear) -> Tensor:
    """Return Linear(Concat(x, skip)): x, skip (..., D), weight (N, 2D) -> (..., N)."""
    return F.linear(torch.cat([x, skip], dim=-1), *linear)


def why_not(x: Tensor, skip: Tensor, linear: Linear) -> str | None:
    """Return why the fused op cannot take these tensors, or None."""
    N, D = linear.weight.shape[0], x.shape[-1]
    return checks.why_not(x, skip=(skip, tuple(x.shape)), linear=(linear, (N, 2 * D))) or checks.narrow(N, 64)


def skip_linear(x: Tensor, skip: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
    """Run the fused op: one accumulator over two ranges of K, and gradients written straight into their tensors.

    Args:
        x, skip: (..., D), bf16 or fp16; every other tensor has their dtype.
        linear: weight (N, 2D).

    Returns:
        (..., N), and its sums, see `layernorm.sums`.

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("skip_linear", why_not(x, skip, linear))
    return run(x, skip, linear)


def _forward(x: Tensor, skip: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
    out = (*x.shape[:-1], linear.weight.shape[0])
    linear, written = Linear(rows(linear.weight), linear.bias), sums.new(x, out)
    y = gemm.core(x.device).linear(rows(x), linear, x2=rows(skip), sums=written)  # (M, N)
    return y.view(out), written


def _fake(x, skip, linear):
    out = (*x.shape[:-1], linear.weight.shape[0])
    return x.new_empty(out), sums.new(x, out)


def _backward(
    dy: Tensor, x: Tensor, skip: Tensor, weight: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    core, dy, D = gemm.core(x.device), rows(dy), x.shape[-1]
    halves = [slice(i * D, (i + 1) * D) for i in range(2)]
    wide = rows(weight)
    dx, dskip = (core.input_gradient(dy, wide[:, half]).view(x.shape) for half in halves)
    if not wanted:  # frozen
        return dx, dskip, x.new_empty(0), x.new_empty(0)
    dweight = torch.empty_like(wide)  # (N, 2D), each half written where it belongs
    _, dbias = core.weight_gradient(dy, rows(x), bias=True, out=dweight[:, halves[0]])
    core.weight_gradient(dy, rows(skip), bias=False, out=dweight[:, halves[1]])
    return dx, dskip, dweight, dbias


def _fake_backward(dy, x, skip, weight, wanted):
    return *empty(x, skip), *learned(wanted, weight, weight[:, 0])


def _save(ctx, inputs, output):
    x, skip, linear = inputs
    ctx.save_for_backward(x, skip, linear.weight)


def _gradient(ctx, backward, dy):
    dx, dskip, *layer = backward(dy, *ctx.saved_tensors, learns(ctx, 2))
    return dx, dskip, tuple(layer)


run = _op = Op(
    "skip_linear",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
