"""A whole transformer block: its ops one after the other, with one recording and one autograd node.

For eager code, whose Python takes longer than the kernels if images are few. Where ops are traced, watched or
recomputed, they are called one by one.
"""

from typing import Any

from torch import Tensor

from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops import attention as attention_op
from uvit_fast.kernels.ops import linear_residual, ln_linear, ln_mlp, proj_ln_mlp, skip_linear
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.device import interpreting
from uvit_fast.kernels.runtime.op import Eager, is_last_backward, is_watched, learns, wants_gradient
from uvit_fast.runtime.flags import Flag

one_by_one = Flag("one_by_one")  # no whole block runs: what its ops keep is chosen per op


def run(
    x: Tensor,
    skip: Tensor | None,
    sums: Tensor | None,
    layers: tuple[Linear | None, Norm, Linear, Linear, Norm, Linear, Linear],
    heads: int,
) -> tuple[Tensor, Tensor] | None:
    """Run the block on x (B, L, D), joined with a long skip (B, L, D) if it has one.

    Saves what its ops save: with a skip `proj_ln_mlp`, else `linear_residual` and `ln_mlp`.

    Args:
        sums: of x, as a block returns them.
        layers: after the long skip, None without one; norm1, qkv, proj, norm2, fc1, fc2.

    Returns:
        (B, L, D) and its sums, and with them gradients, bit for bit those of the ops; None if the ops must be called:
        some cannot run, or are watched.
    """
    possible = x.device.type == "cuda" or interpreting()
    if not possible or is_watched(x) or one_by_one or checks.forward_mode():
        return None
    joined, *others = layers
    layers = joined or Linear(None), *others
    return _block(x, skip, sums, *layers, heads, wants_gradient(x, skip, *layers))


def _why_not(x: Tensor, skip: Tensor | None, *rest: Any) -> str | None:
    """Return why some op of the block cannot take `_forward`'s arguments, or None."""
    _, joined, norm1, qkv, proj, norm2, fc1, fc2, heads, _ = rest
    B, L, D = x.shape
    if qkv.weight.shape[0] != 3 * D or D % heads:
        return f"a weight {tuple(qkv.weight.shape)} gives no q, k and v of {heads} heads"
    packed = x.new_empty(1, L, 3, heads, D // heads).expand(B, -1, -1, -1, -1)
    reason = skip_linear.why_not(x, skip, joined) if skip is not None else None
    reason = reason or ln_linear.why_not(x, norm1, qkv) or attention_op.why_not(packed)
    return reason or proj_ln_mlp.why_not(x, proj, x, norm2, fc1, fc2)


def _forward(
    x: Tensor,
    skip: Tensor | None,
    sums: Tensor | None,
    joined: Linear,
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    heads: int,
    save: bool,
) -> tuple[Tensor | None, ...]:
    """Return the result and its sums; with `save` also what `_save` keeps."""
    (B, L, D), h, middle = x.shape, None, None
    if skip is not None:
        h, sums = skip_linear._forward(x, skip, joined)
    packed, stats1 = ln_linear._forward(x if h is None else h, norm1, qkv, sums, 1.0, save)
    packed = packed.view(B, L, 3, heads, D // heads)
    a, lse = attention_op._forward(packed)
    kept = [packed, a, lse] if save else []
    del packed  # or it would stay through the MLP
    if h is not None:
        y, sums, stats2, act = proj_ln_mlp._forward(a, proj, h, norm2, fc1, fc2, save)
    else:
        middle, sums = linear_residual._forward(a, proj, x)
        del a
        y, sums, stats2, act = ln_mlp._forward(middle, norm2, fc1, fc2, sums, save)
    return (y, sums, h, stats1, *kept, middle, stats2, act) if save else (y, sums)


def _backward(
    dy: Tensor,
    wanted: tuple[bool, ...],
    last: bool,
    x: Tensor,
    skip: Tensor | None,
    h: Tensor | None,
    stats1: Tensor,
    packed: Tensor,
    a: Tensor,
    lse: Tensor,
    middle: Tensor | None,
    stats2: Tensor,
    act: Tensor,
    *weights: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, skip and the layers' tensors, in order, and the second part of x's.

    Args:
        wanted: which linear layers need gradients, in order; the others may get empty tensors.
    """
    joined, gamma1, beta1, qkv, shift, proj, offset, gamma2, beta2, fc1, fc2 = weights
    h = x if h is None else h
    mlp = stats2, act, gamma2, beta2, fc1, fc2
    if middle is None:
        da, dproj, doffset, dh, *dmlp = proj_ln_mlp._backward(dy, a, proj, offset, h, *mlp, *wanted[2:], last)
    else:
        dh, *dmlp = ln_mlp._backward(dy, middle, *mlp, *wanted[3:], last)
        da, dproj, doffset = linear_residual._backward(dh, a, proj, wanted[2])
    dpacked = attention_op._backward(packed, a, lse, da).view(*x.shape[:-1], -1)
    given = h, stats1, gamma1, beta1, qkv, shift is not None, wanted[1]
    more, dgamma1, dbeta1, dqkv, dshift = ln_linear._backward(dpacked, *given)
    dskip = djoined = dbias = None
    if skip is not None:
        dh, dskip, djoined, dbias = skip_linear._backward(dh.add_(more), x, skip, joined, wanted[0])
        more = None
    first = djoined, dbias, dgamma1, dbeta1, dqkv, None if shift is None else dshift
    return dh, dskip, *first, dproj, doffset, *dmlp, more


_LINEAR = (3, 8, 10, 15, 17)  # positions of joined, qkv, proj, fc1 and fc2 among the single arguments


def _save(ctx, inputs, output):
    x, skip, _, joined, norm1, qkv, proj, norm2, fc1, fc2, *_ = inputs
    weights = joined.weight, *norm1[:2], *qkv, *proj, *norm2[:2], fc1.weight, fc2.weight
    ctx.save_for_backward(x, skip, *output[2:], *weights)


def _gradient(ctx, backward, dy):
    wanted = tuple(learns(ctx, at) for at in _LINEAR)
    dx, dskip, *rest, more = backward(dy, wanted, is_last_backward(dy), *ctx.saved_tensors)
    djoined, dbias, dgamma1, dbeta1, dqkv, dshift, dproj, doffset, dgamma2, dbeta2, *mlp = rest
    norm1, norm2 = (dgamma1, dbeta1, None), (dgamma2, dbeta2, None)
    return dx, dskip, None, djoined, dbias, norm1, dqkv, dshift, dproj, doffset, norm2, *mlp, None, None, more


_block = Eager(
    forward=_forward,
    backward=_backward,
    save=_save,
    gradient=_gradient,
    why_not=_why_not,
    results=2,
    twice=True,
)
