"""Linear(LayerNorm(x)), without writing the normalised tensor."""

import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import backward as layernorm
from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import ACCUMULATE, rows
from uvit_fast.kernels.runtime.op import Op, empty, learned, learns, wants_gradient


def reference(x: Tensor, norm: Norm, linear: Linear) -> Tensor:
    """Return Linear(LayerNorm(x)), normed over the last dimension: x (..., D), weight (N, D) -> (..., N)."""
    return F.linear(F.layer_norm(x, x.shape[-1:], *norm), *linear)


def why_not(x: Tensor, norm: Norm, linear: Linear) -> str | None:
    """Return why the fused op cannot take these tensors, or None."""
    N, D = linear.weight.shape[0], x.shape[-1]
    return checks.why_not(x, norm=(norm, D), linear=(linear, (N, D))) or checks.narrow(N, 8)


def ln_linear(x: Tensor, norm: Norm, linear: Linear, sums: Tensor | None = None) -> Tensor:
    """Run the fused op, `reference` in one GEMM: rstd * (x @ V.T) + (bias + W @ beta).

    V is gamma * W minus each row's mean, computed in a pass over W; the statistics come from one over x in the same
    launch, or from the sums that the fused op which wrote x returned beside it. Saves x and the fp32 statistics.

    Args:
        x: (..., D), bf16 or fp16; every other tensor has its dtype.
        norm: of D; linear: weight (N, D).
        sums: (D / 64, 2, tokens) fp32, of x: see `layernorm.sums`.

    Returns:
        (..., N).

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("ln_linear", why_not(x, norm, linear))
    return run(x, norm, linear, sums)


def run(x: Tensor, norm: Norm, linear: Linear, sums: Tensor | None = None) -> Tensor:
    """Run `ln_linear` on tensors that `why_not` accepted."""
    return _op(x, norm, linear, sums, 1.0, wants_gradient(x, norm, linear))[0]


def _forward(
    x: Tensor, norm: Norm, linear: Linear, sums: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    """Return scale * Linear(LayerNorm(x)), and the statistics, which are empty unless `save`.

    The recomputed first half of a fused MLP uses scale 1/2.
    """
    core, flat, linear = gemm.core(x.device), rows(x), Linear(rows(linear.weight), linear.bias)
    folded = fold.prepare(flat, norm, linear, sums, scale, measured=save or not core.takes_sums(flat, linear.weight))
    y = core.linear(flat, folded.linear, stats=folded.stats)  # (M, N)
    return y.view(*x.shape[:-1], y.shape[-1]), folded.stats if save else flat.new_empty(0, dtype=ACCUMULATE)


def _fake(x, norm, linear, sums, scale, save):
    y = x.new_empty(*x.shape[:-1], linear.weight.shape[0])
    return y, fold.new_statistics(x, x.numel() // x.shape[-1]) if save else x.new_empty(0, dtype=ACCUMULATE)


def _backward(
    dy: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, has_bias: bool, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    core, flat, dy = gemm.core(x.device), rows(x), rows(dy)
    g = core.input_gradient(dy, rows(weight))  # (M, D)
    dx, normed, dgamma, dbeta = layernorm.backward(g, flat, stats, gamma, beta)
    # (N, D), (N,); frozen, none
    dweight, dbias = core.weight_gradient(dy, normed, bias=has_bias) if wanted else (dy.new_empty(0), None)
    return dx.view(x.shape), dgamma, dbeta, dweight, dy.new_empty(0) if dbias is None else dbias


def _fake_backward(dy, x, stats, gamma, beta, weight, has_bias, wanted):
    return *empty(x, gamma, beta), *learned(wanted, weight), *learned(wanted and has_bias, weight[:, 0])


def _save(ctx, inputs, output):
    x, norm, linear, _, scale, _ = inputs
    assert scale == 1, "only what needs no gradient is scaled"
    ctx.save_for_backward(x, output[1], norm.weight, norm.bias, linear.weight)
    ctx.has_bias = linear.bias is not None


def _gradient(ctx, backward, dy):
    dx, dgamma, dbeta, dweight, dbias = backward(dy, *ctx.saved_tensors, ctx.has_bias, learns(ctx, 4))
    return dx, (dgamma, dbeta, None), (dweight, dbias if ctx.has_bias else None), None, None, None


_op = Op(
    "ln_linear",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
