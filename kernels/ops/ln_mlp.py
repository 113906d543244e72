"""x + MLP(LayerNorm(x)), the second half of a transformer block."""

import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import backward as layernorm
from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.layernorm import sums as layernorm_sums
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.runtime import checks, program
from uvit_fast.kernels.runtime.checks import ACCUMULATE, rows
from uvit_fast.kernels.runtime.op import Op, empty, is_last_backward, learned, learns, wants_gradient


def reference(x: Tensor, norm: Norm, fc1: Linear, fc2: Linear) -> Tensor:
    """Return x + fc2(GELU(fc1(LayerNorm(x)))), with the erf GELU: x (..., D), fc1 (4D, D), fc2 (D, 4D) -> (..., D)."""
    h = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *norm), *fc1))  # (..., 4D)
    return x + F.linear(h, *fc2)


def why_not(x: Tensor, norm: Norm, fc1: Linear, fc2: Linear) -> str | None:
    """Return why the fused op cannot take these tensors, or None."""
    D, H = x.shape[-1], fc1.weight.shape[0]
    reason = checks.why_not(x, norm=(norm, D), fc1=(fc1, (H, D)), fc2=(fc2, (D, H)))
    if reason is None and H % 64:
        return f"the hidden width {H} is no multiple of 64"
    return reason


def ln_mlp(x: Tensor, norm: Norm, fc1: Linear, fc2: Linear, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the fused op, `reference` in two GEMMs: LayerNorm, bias and GELU in one, bias and residual in the other.

    A tensor of shape (tokens, 4D) is written once, twice if a gradient is needed: half the GELU's argument is kept for
    the backward, which recomputes the value in its place. Saves x, the fp32 statistics and that half: 5 D per token.

    Args:
        x: (..., D), bf16 or fp16; every other tensor has its dtype.
        norm: of D; fc1: weight (H, D); fc2: weight (D, H).
        sums: (D / 64, 2, tokens) fp32, of x: see `layernorm.sums`.

    Returns:
        (..., D), and its sums.

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("ln_mlp", why_not(x, norm, fc1, fc2))
    return run(x, norm, fc1, fc2, sums)


def run(x: Tensor, norm: Norm, fc1: Linear, fc2: Linear, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run `ln_mlp` on tensors that `why_not` accepted."""
    return _op(x, norm, fc1, fc2, sums, wants_gradient(x, norm, fc1, fc2))[:2]


def _forward(
    x: Tensor, norm: Norm, fc1: Linear, fc2: Linear, sums: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return compute(x, norm, fc1, fc2, sums, save)


def compute(
    x: Tensor, norm: Norm, fc1: Linear, fc2: Linear, sums: Tensor | None, save: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result, its sums, x's statistics, and half the GELU's argument.

    With `overwrite` the result takes x's place. The last one is empty unless `save`.
    """
    core, flat, written = gemm.core(x.device), rows(x), layernorm_sums.new(x)
    measured = save or not core.takes_sums(flat, fc1.weight)
    folded = fold.prepare(flat, norm, Linear(rows(fc1.weight), fc1.bias), sums, scale=0.5, measured=measured)
    act, h = core.linear_gelu(flat, folded.linear, stats=folded.stats, save=save)  # (M, H)
    fc2 = Linear(rows(fc2.weight), fc2.bias)
    y = core.linear(act, fc2, residual=flat, overwrite=overwrite, sums=written)  # (M, D)
    stats = folded.stats if save else x.new_empty(0, dtype=ACCUMULATE)
    return y.view(x.shape), written, stats, x.new_empty(0) if h is None else h


def _fake(x, norm, fc1, fc2, sums, save):
    M = x.numel() // x.shape[-1]
    h = x.new_empty(M, fc1.weight.shape[0]) if save else x.new_empty(0)
    stats = fold.new_statistics(x, M) if save else x.new_empty(0, dtype=ACCUMULATE)
    return x.new_empty(x.shape), layernorm_sums.new(x), stats, h


def _backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    h: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    w2: Tensor,
    wanted1: bool,
    wanted2: bool,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    core, flat, dy = gemm.core(x.device), rows(x), rows(dy)
    da, act, db1 = core.linear_gelu_backward(dy, rows(w2), h, overwrite=last)  # (M, H), (M, H), (H,)
    # (D, H); frozen, none
    dw2 = core.weight_gradient(dy, act, bias=False)[0] if wanted2 else dy.new_empty(0)
    if last:  # autograd holds on to h, which is act by now, until this returns
        program.free(h)
    del act
    g = core.input_gradient(da, rows(w1))  # (M, D)
    dx, normed, dgamma, dbeta, db2 = layernorm.backward(g, flat, stats, gamma, beta, dy)
    # (H, D), or none; fc1's bias came with da, fc2's with dx
    dw1 = core.weight_gradient(da, normed, bias=False)[0] if wanted1 else dy.new_empty(0)
    return dx.view(x.shape), dgamma, dbeta, dw1, db1, dw2, db2


def _fake_backward(dy, x, stats, h, gamma, beta, w1, w2, wanted1, wanted2, last):
    dw1, dw2 = learned(wanted1, w1)[0], learned(wanted2, w2)[0]
    return *empty(x, gamma, beta), dw1, x.new_empty(w1.shape[0]), dw2, x.new_empty(w2.shape[0])


def _save(ctx, inputs, output):
    x, norm, fc1, fc2 = inputs[:4]
    _, _, stats, h = output
    ctx.save_for_backward(x, stats, h, norm.weight, norm.bias, fc1.weight, fc2.weight)


def _gradient(ctx, backward, dy):
    dx, dgamma, dbeta, dw1, db1, dw2, db2 = backward(
        dy, *ctx.saved_tensors, learns(ctx, 4), learns(ctx, 6), is_last_backward(dy)
    )
    return dx, (dgamma, dbeta, None), (dw1, db1), (dw2, db2), None, None


_op = Op(
    "ln_mlp",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
