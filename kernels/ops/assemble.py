"""A U-ViT's token sequence in one pass: embedded patches after the other tokens, positions added to all."""

from collections.abc import Sequence

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
IMAGES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes
_TILE = {"TOKENS": 32, "FEATURES": 128, "num_warps": 4}  # bound by its output: nothing to tune


def reference(x: Tensor, weight: Tensor, bias: Tensor, extras: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Return Concat(extras, Patches(x)) + positions, (B, E + N, D) with N = H W / p^2 patches, row-major.

    x is (B, C, H, W), weight (D, C, p, p), extras one or two times some of (B, E, D), positions (1, E + N, D).
    """
    patches = F.conv2d(x.to(weight.dtype), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([*(each.to(patches.dtype) for each in extras), patches], dim=1) + positions


def why_not(x: Tensor, weight: Tensor, bias: Tensor, extras: Sequence[Tensor], positions: Tensor) -> str | None:
    """Return why the fused op cannot take these tensors, or None."""
    if len(extras) not in (1, 2):
        return f"there are {len(extras)} tensors of other tokens, not one or two"
    B, C, H, W = x.shape
    D, p, E = weight.shape[0], weight.shape[-1], sum(each.shape[1] for each in extras)
    reason = checks.why_not(
        extras[0],
        weight=(weight, (D, C, p, p)),
        bias=(bias, (D,)),
        first=(extras[0], (B, extras[0].shape[1], D)),
        last=(extras[-1], (B, extras[-1].shape[1], D)),
        positions=(positions, (1, E + (H // p) * (W // p), D)),
    )
    if reason is None and (x.dtype not in IMAGES or x.device != weight.device):
        return f"the image is {x.dtype} on {x.device}, the weight on {weight.device}"
    if reason is None and (H % p or W % p):
        return f"the image, {H} x {W}, does not divide into patches of {p} x {p}"
    if reason is None and C * p * p > VALUES:
        return f"a patch has {C * p * p} values; the fused op takes {VALUES}"
    if reason is None and torch.is_grad_enabled() and x.requires_grad:
        return "the image wants a gradient"
    return reason


def assemble(x: Tensor, weight: Tensor, bias: Tensor, extras: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Run the fused op: `reference`, each token written once. Saves the image in the weight's dtype.

    Args:
        x: (B, C, H, W), of any floating-point dtype, rounded to the weight's; without a gradient.
        weight: (D, C, p, p), bias: (D,), of a convolution with stride p; bf16 or fp16, as all but x.
        extras: tokens that are not patches, (B, E, D), or two such tensors, one after the other.
        positions: (1, E + H W / p^2, D).

    Returns:
        (B, E + H W / p^2, D).

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("assemble", why_not(x, weight, bias, extras, positions))
    return run(x, weight, bias, extras, positions)


def run(x: Tensor, weight: Tensor, bias: Tensor, extras: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Run `assemble` on tensors that `why_not` accepted."""
    return _op(x, weight, bias, extras[0], extras[1] if len(extras) == 2 else None, positions)


@triton.jit
def _assemble_kernel(
    x,  # (B, C, H, W), images `apart` elements apart
    weight,  # (D, C, p, p)
    bias,  # (D,)
    first,  # (B, E, D)
    second,  # (B, F, D)
    positions,  # (L, D)
    out,  # (B, L, D)
    apart,
    M,  # B L
    L,
    E,
    F,
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
    patch = place - E - F
    down, across = patch // (W // P), patch % (W // P)
    corner = image * apart + down * P * W + across * P
    inside = k // (P * P) * H * W + k // P % P * W + k % P
    is_patch = (row < M) & (patch >= 0)
    a = tl.load(x + corner[:, None] + inside[None, :], mask=is_patch[:, None] & (k < K)[None, :], other=0.0)
    w = tl.load(weight + col[None, :] * K + k[:, None], mask=(k < K)[:, None] & (col < D)[None, :], other=0.0)
    a = a.to(tl.float32).to(w.dtype)  # as PyTorch rounds float64 too
    tokens = tl.dot(a, w, input_precision="ieee")
    tokens += tl.load(bias + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    written = (row < M)[:, None] & (col < D)[None, :]
    given = tl.where(place < E, first + (image * E + place) * D, second + (image * F + place - E) * D)
    others = tl.load(given[:, None] + col[None, :], mask=(patch < 0)[:, None] & written, other=0.0)
    tokens = tl.where(is_patch[:, None], tokens, others.to(tl.float32))
    tokens += tl.load(positions + place[:, None] * D + col[None, :], mask=written, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * D + col[None, :], tokens.to(out.dtype.element_ty), mask=written)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, first: Tensor, second: Tensor | None, positions: Tensor
) -> Tensor:
    (B, E, D), L, K = first.shape, positions.shape[1], weight[0].numel()
    out = first.new_empty(B, L, D)
    x = x if x[0].is_contiguous() else x.contiguous()
    tensors = [t.contiguous() for t in (weight, bias, first, first if second is None else second, positions)]
    F = 0 if second is None else second.shape[1]
    args = (x, *tensors, out, x.stride(0), B * L, L, E, F, D, *x.shape[2:])
    options = {"K": K, "P": weight.shape[-1], "PADDED": max(16, triton.next_power_of_2(K)), **_TILE}
    tiles = cdiv(D, _TILE["FEATURES"]) * cdiv(B * L, _TILE["TOKENS"])
    launch.run(x.device, _assemble_kernel, (tiles,), args, options)
    return out


def _fake(x, weight, bias, first, second, positions):
    return first.new_empty(first.shape[0], positions.shape[1], weight.shape[0])


def _backward(dy: Tensor, x: Tensor, weight: Tensor, extras: int) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = dy.shape
    C, p = weight.shape[1], weight.shape[-1]
    total = dy.sum(0, dtype=ACCUMULATE)  # (L, D)
    # The patches as rows, and zeros where other tokens stand: the product then takes dy as it lies.
    rows = x.new_zeros(B, L, C * p * p)
    patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, H/p, W/p, C, p, p)
    rows[:, extras:].view(B, *patches.shape[1:3], C, p, p).copy_(patches)
    dweight = dy.reshape(-1, D).t() @ rows.view(B * L, -1)  # (D, C p p)
    dbias = total[extras:].sum(0)
    return dweight.view(weight.shape), dbias.to(dy.dtype), total.to(dy.dtype)[None]


def _fake_backward(dy, x, weight, extras):
    (_, L, D), (dweight,) = dy.shape, empty(weight)
    return dweight, dy.new_empty(D), dy.new_empty(1, L, D)


def _save(ctx, inputs, output):
    x, weight, _, first, second, _ = inputs
    ctx.save_for_backward(x.to(weight.dtype), weight)
    ctx.first, ctx.extras = first.shape[1], first.shape[1] + (0 if second is None else second.shape[1])


def _gradient(ctx, backward, dy):
    dweight, dbias, dpositions = backward(dy, *ctx.saved_tensors, ctx.extras)
    dsecond = dy[:, ctx.first : ctx.extras] if ctx.extras > ctx.first else None
    return None, dweight, dbias, dy[:, : ctx.first], dsecond, dpositions


_op = Op(
    "assemble",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
