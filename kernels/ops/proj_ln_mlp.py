"""The rest of a block after its attention, projection and MLP, with less kept for the backward."""

from torch import Tensor

from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops import linear_residual, ln_mlp
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.op import Op, is_last_backward, learns, wants_gradient


def reference(a: Tensor, proj: Linear, x: Tensor, norm: Norm, fc1: Linear, fc2: Linear) -> Tensor:
    """Return m + MLP(LayerNorm(m)) of m = x + Linear(a): a (..., K), proj (D, K), x (..., D) -> (..., D)."""
    return ln_mlp.reference(linear_residual.reference(a, proj, x), norm, fc1, fc2)


def why_not(a: Tensor, proj: Linear, x: Tensor, norm: Norm, fc1: Linear, fc2: Linear) -> str | None:
    """Return why the fused op cannot take these tensors, or None."""
    return linear_residual.why_not(a, proj, x) or ln_mlp.why_not(x, norm, fc1, fc2)


def proj_ln_mlp(a: Tensor, proj: Linear, x: Tensor, norm: Norm, fc1: Linear, fc2: Linear) -> tuple[Tensor, Tensor]:
    """Run `linear_residual`, then `ln_mlp`; the backward recomputes what lies between them.

    The projection is the cheapest GEMM of a block: D fewer values kept per token, for 2% of its time. Saves a, x, the
    fp32 statistics and half the GELU's argument.

    Args:
        a: (..., K), bf16 or fp16, the attention's output; every other tensor has its dtype.
        proj: weight (D, K); x: (..., D).
        norm, fc1, fc2: as for `ln_mlp`.

    Returns:
        (..., D), and its sums, see `layernorm.sums`.

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("proj_ln_mlp", why_not(a, proj, x, norm, fc1, fc2))
    return run(a, proj, x, norm, fc1, fc2)


def run(a: Tensor, proj: Linear, x: Tensor, norm: Norm, fc1: Linear, fc2: Linear) -> tuple[Tensor, Tensor]:
    """Run `proj_ln_mlp` on tensors that `why_not` accepted."""
    return _op(a, proj, x, norm, fc1, fc2, wants_gradient(a, proj, x, norm, fc1, fc2))[:2]


def _forward(
    a: Tensor, proj: Linear, x: Tensor, norm: Norm, fc1: Linear, fc2: Linear, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    middle, sums = linear_residual._forward(a, proj, x)
    return ln_mlp.compute(middle, norm, fc1, fc2, sums, save, overwrite=True)


def _fake(a, proj, x, norm, fc1, fc2, save):
    return ln_mlp._fake(x, norm, fc1, fc2, None, save)


def _backward(
    dy: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    stats: Tensor,
    h: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    w2: Tensor,
    wanted: bool,
    wanted1: bool,
    wanted2: bool,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    middle, _ = linear_residual._forward(a, Linear(weight, bias), x)
    dx, *rest = ln_mlp._backward(dy, middle, stats, h, gamma, beta, w1, w2, wanted1, wanted2, last)
    return *linear_residual._backward(dx, a, weight, wanted), dx, *rest


def _fake_backward(dy, a, weight, bias, x, stats, h, gamma, beta, w1, w2, wanted, wanted1, wanted2, last):
    first = linear_residual._fake_backward(dy, a, weight, wanted)
    return *first, *ln_mlp._fake_backward(dy, x, stats, h, gamma, beta, w1, w2, wanted1, wanted2, last)


def _save(ctx, inputs, output):
    a, proj, x, norm, fc1, fc2, _ = inputs
    _, _, stats, h = output
    ctx.save_for_backward(a, *proj, x, stats, h, norm.weight, norm.bias, fc1.weight, fc2.weight)


def _gradient(ctx, backward, dy):
    wanted = (learns(ctx, 1), learns(ctx, 7), learns(ctx, 9))
    da, dw, db, dx, dgamma, dbeta, dw1, db1, dw2, db2 = backward(dy, *ctx.saved_tensors, *wanted, is_last_backward(dy))
    return da, (dw, db), dx, (dgamma, dbeta, None), (dw1, db1), (dw2, db2), None


_op = Op(
    "proj_ln_mlp",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
