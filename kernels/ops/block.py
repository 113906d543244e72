"""A whole transformer block: its ops one after the other, with one list of launches and one autograd node.

For eager code, whose Python takes longer than the kernels for few images. If ops are watched, traced or recomputed,
they are called one by one.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

from uvit_fast.kernels.layers import Layers
from uvit_fast.kernels.ops import attention as attention_op
from uvit_fast.kernels.ops import linear_residual, ln_linear, ln_mlp, proj_ln_mlp, skip_linear
from uvit_fast.kernels.runtime.device import interpreting
from uvit_fast.kernels.runtime.op import Eager, is_last_backward, is_watched, learns, wants_gradient

_one_by_one: ContextVar[bool] = ContextVar("one_by_one", default=False)


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Let a block's ops be called one by one while open: what they keep is chosen per op."""
    token = _one_by_one.set(True)
    try:
        yield
    finally:
        _one_by_one.reset(token)


def run(
    x: Tensor, skip: Tensor | None, sums: Tensor | None, layers: Layers, heads: int
) -> tuple[Tensor, Tensor] | None:
    """Run the block on x (B, L, D), joined with a long skip (B, L, D) if it has one.

    Saves what its ops save: with a skip `proj_ln_mlp`, else `linear_residual` and `ln_mlp`.

    Args:
        sums: of x, as a block returns them.

    Returns:
        (B, L, D) and its sums, bit for bit those of the ops; None if the ops must be called: some cannot run, or are
        watched.
    """
    if is_watched(x) or _one_by_one.get() or not (x.device.type == "cuda" or interpreting()):
        return None
    save = wants_gradient(x, *layers) or (skip is not None and wants_gradient(skip))
    return _block(x, skip, sums, layers, heads, save)


def _why_not(x: Tensor, skip: Tensor | None, sums: Tensor | None, layers: Layers, heads: int, save: bool) -> str | None:
    """Return why some op of the block cannot take these tensors, or None."""
    (B, L, D), of = x.shape, layers
    if of.qkv.weight.shape[0] != 3 * D or D % heads:
        return f"a weight {tuple(of.qkv.weight.shape)} gives no q, k and v of {heads} heads"
    packed = x.new_empty(1, L, 3, heads, D // heads).expand(B, -1, -1, -1, -1)
    reason = skip_linear.why_not(x, skip, of.joined) if skip is not None else None
    reason = reason or ln_linear.why_not(x, of.norm1, of.qkv) or attention_op.why_not(packed)
    return reason or proj_ln_mlp.why_not(x, of.proj, x, of.norm2, of.fc1, of.fc2)


def _forward(
    x: Tensor, skip: Tensor | None, sums: Tensor | None, layers: Layers, heads: int, save: bool
) -> tuple[Tensor | None, ...]:
    """Return the result and its sums; with `save` also what `_save` keeps."""
    (B, L, D), of, h = x.shape, layers, x
    if skip is not None:
        h, sums = skip_linear._forward(x, skip, of.joined)
    packed, stats1 = ln_linear._forward(h, of.norm1, of.qkv, sums, 1.0, save)
    packed = packed.view(B, L, 3, heads, D // heads)
    a, lse = attention_op._forward(packed)
    mlp = of.norm2, of.fc1, of.fc2
    if skip is not None:
        middle = None
        y, sums, stats2, act = proj_ln_mlp._forward(a, of.proj, h, *mlp, save)
    else:
        middle, sums = linear_residual._forward(a, of.proj, h)
        y, sums, stats2, act = ln_mlp._forward(middle, *mlp, sums, save)
        h = None  # x itself
    return (y, sums, h, stats1, packed, a, lse, middle, stats2, act) if save else (y, sums)


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
    """Return the gradients of x, skip and the layers' tensors, in order.

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
    dx, dgamma1, dbeta1, dqkv, dshift = ln_linear._backward(dpacked, *given)
    dx.add_(dh)
    dskip = djoined = dbias = None
    if skip is not None:
        dx, dskip, djoined, dbias = skip_linear._backward(dx, x, skip, joined, wanted[0])
    first = djoined, dbias, dgamma1, dbeta1, dqkv, None if shift is None else dshift
    return dx, dskip, *first, dproj, doffset, *dmlp


_LINEAR = (3, 8, 10, 15, 17)  # positions of joined, qkv, proj, fc1 and fc2 among the single arguments


def _save(ctx, inputs, output):
    x, skip, _, of, *_ = inputs
    norms = of.norm1[:2], of.norm2[:2]
    weights = of.joined.weight, *norms[0], *of.qkv, *of.proj, *norms[1], of.fc1.weight, of.fc2.weight
    ctx.save_for_backward(x, skip, *output[2:], *weights)


def _gradient(ctx, backward, dy):
    wanted = tuple(learns(ctx, at) for at in _LINEAR)
    dx, dskip, *rest = backward(dy, wanted, is_last_backward(dy), *ctx.saved_tensors)
    dw, db, dgamma1, dbeta1, dqkv, dshift, dproj, doffset, dgamma2, dbeta2, *mlp = rest
    halves = (dw, db, dgamma1, dbeta1, None), (dqkv, dshift, dproj, doffset, dgamma2, dbeta2, None)
    return dx, dskip, None, *halves, tuple(mlp), None, None


_block = Eager(forward=_forward, backward=_backward, save=_save, gradient=_gradient, why_not=_why_not, results=2)
