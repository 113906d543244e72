"""A U-ViT's token sequence in one pass: embedded patches after the other tokens, positions added to all."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.runtime import checks, launch
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.launch import cdiv
from uvit_fast.kernels.runtime.op import Op, empty

VALUES = 256  # maximum per patch: the product has one step
_TILE = {"TOKENS": 32, "FEATURES": 128, "num_warps": 4}  # bound by its output: nothing to tune


def reference(x: Tensor, weight: Tensor, bias: Tensor, extras: Tensor, positions: Tensor) -> Tensor:
    """Return Concat(extras, Patches(x)) + positions, (B, E + N, D) with N = H W / p^2 patches, row-major.

    x is (B, C, H, W), weight (D, C, p, p), extras (B, E, D), positions (1, E + N, D).
    """
    patches = F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)  # (B, N, D)
    return torch.cat([extras.to(patches.dtype), patches], dim=1) + positions


def why_not(x: Tensor, weight: Tensor, bias: Tensor, extras: Tensor, positions: Tensor) -> str | None:
    """Return why the fused op cannot take these tensors, or None."""
    B, C, H, W = x.shape
    D, p, E = weight.shape[0], weight.shape[-1], extras.shape[1]
    reason = checks.why_not(
        extras,
        x=(x, (B, C, H, W)),
        weight=(weight, (D, C, p, p)),
        bias=(bias, (D,)),
        positions=(positions, (1, E + (H // p) * (W // p), D)),
    )
    if reason is None and (H % p or W % p):
        return f"the image, {H} x {W}, does not divide into patches of {p} x {p}"
    if reason is None and C * p * p > VALUES:
        return f"a patch has {C * p * p} values; the fused op takes {VALUES}"
    if reason is None and torch.is_grad_enabled() and x.requires_grad:
        return "the image wants a gradient"
    return reason


def assemble(x: Tensor, weight: Tensor, bias: Tensor, extras: Tensor, positions: Tensor) -> Tensor:
    """Run the fused op: `reference`, each token written once. Saves the image.

    Args:
        x: (B, C, H, W), bf16 or fp16, without a gradient; every other tensor has its dtype.
        weight: (D, C, p, p), bias: (D,), of a convolution with stride p.
        extras: (B, E, D), tokens that are not patches.
        positions: (1, E + H W / p^2, D).

    Returns:
        (B, E + H W / p^2, D).

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("assemble", why_not(x, weight, bias, extras, positions))
    return _op(x, weight, bias, extras, positions)


@triton.jit
def _assemble_kernel(
    x,  # (B, C, H, W)
    weight,  # (D, C, p, p)
    bias,  # (D,)
    extras,  # (B, E, D)
    positions,  # (L, D)
    out,  # (B, L, D)
    M,  # B L
    L,
    E,
    D,
    H,
    W,
    K: tl.constexpr,  # C p p
    P: tl.constexpr,
    PADDED: tl.constexpr,  # K for the product: a power of two, at least 16
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    row = tl.program_id(0) // tl.cdiv(D, FEATURES) * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(0) % tl.cdiv(D, FEATURES) * FEATURES + tl.arange(0, FEATURES)
    k = tl.arange(0, PADDED)
    image, place = (row // L).to(tl.int64), row % L
    patch = place - E
    down, across = patch // (W // P), patch % (W // P)
    first = image * (K // (P * P)) * H * W + down * P * W + across * P
    inside = k // (P * P) * H * W + k // P % P * W + k % P
    is_patch = (row < M) & (place >= E)
    a = tl.load(x + first[:, None] + inside[None, :], mask=is_patch[:, None] & (k < K)[None, :], other=0.0)
    w = tl.load(weight + col[None, :] * K + k[:, None], mask=(k < K)[:, None] & (col < D)[None, :], other=0.0)
    tokens = tl.dot(a, w, input_precision="ieee")
    tokens += tl.load(bias + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    where = (image * E + place)[:, None] * D + col[None, :]
    others = tl.load(extras + where, mask=(place < E)[:, None] & (row < M)[:, None] & (col < D)[None, :], other=0.0)
    tokens = tl.where(is_patch[:, None], tokens, others.to(tl.float32))
    written = (row < M)[:, None] & (col < D)[None, :]
    tokens += tl.load(positions + place[:, None] * D + col[None, :], mask=written, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * D + col[None, :], tokens.to(out.dtype.element_ty), mask=written)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, extras: Tensor, positions: Tensor) -> Tensor:
    (B, E, D), L, K = extras.shape, positions.shape[1], weight[0].numel()
    out = x.new_empty(B, L, D)
    tensors = [t.contiguous() for t in (x, weight, bias, extras, positions)]
    args = (*tensors, out, B * L, L, E, D, *x.shape[2:])
    options = {"K": K, "P": weight.shape[-1], "PADDED": max(16, triton.next_power_of_2(K)), **_TILE}
    tiles = cdiv(D, _TILE["FEATURES"]) * cdiv(B * L, _TILE["TOKENS"])
    launch.run(x.device, _assemble_kernel, (tiles,), args, options)
    return out


def _fake(x, weight, bias, extras, positions):
    return extras.new_empty(extras.shape[0], positions.shape[1], weight.shape[0])


def _backward(dy: Tensor, x: Tensor, weight: Tensor, extras: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, D = dy.shape
    C, p = weight.shape[1], weight.shape[-1]
    total = dy.sum(0, dtype=ACCUMULATE)  # (L, D)
    # The patches as rows, and zeros where other tokens stand: the product then takes dy as it lies.
    rows = x.new_zeros(B, L, C * p * p)
    patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, H/p, W/p, C, p, p)
    rows[:, extras:].view(B, *patches.shape[1:3], C, p, p).copy_(patches)
    dweight = dy.reshape(-1, D).t() @ rows.view(B * L, -1)  # (D, C p p)
    dbias = total[extras:].sum(0)
    return dweight.view(weight.shape), dbias.to(dy.dtype), dy[:, :extras].clone(), total.to(dy.dtype)[None]


def _fake_backward(dy, x, weight, extras):
    (B, L, D), (dweight,) = dy.shape, empty(weight)
    return dweight, dy.new_empty(D), dy.new_empty(B, extras, D), dy.new_empty(1, L, D)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.extras = inputs[3].shape[1]


def _gradient(ctx, backward, dy):
    return None, *backward(dy, *ctx.saved_tensors, ctx.extras)


run = _op = Op(
    "assemble",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
