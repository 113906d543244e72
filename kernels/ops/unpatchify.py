"""A network's last tokens as an image, through its final 3x3 convolution, in one launch; without gradients."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from uvit_fast.kernels.runtime import checks, launch
from uvit_fast.kernels.runtime.launch import cdiv
from uvit_fast.kernels.runtime.op import Constant, wants_gradient

IMAGES = (torch.bfloat16, torch.float16, torch.float32)  # dtypes
PIXELS = 32  # per program, with a warp per channel: one value a thread, or each load would wait for a change of layout


def reference(h: Tensor, patch: int, conv: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """Return the square image (B, C, H, H) of tokens (B, N, p p C), row-major, convolved if there is a convolution.

    conv is its weight (C, C, 3, 3) and bias (C,); the image is padded by one pixel of zeros.
    """
    side = math.isqrt(h.shape[1])
    image = rearrange(h, "B (h w) (p1 p2 C) -> B C h p1 w p2", h=side, p1=patch, p2=patch)  # a view
    if conv is None:  # cast and put in place by one copy
        image = image.to(dtype, memory_format=torch.contiguous_format)
    image = rearrange(image, "B C h p1 w p2 -> B C (h p1) (w p2)")  # (B, C, H, H)
    return image if conv is None else F.conv2d(image, *conv, padding=1).to(dtype)


def why_not(h: Tensor, patch: int, conv: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> str | None:
    """Return why the fused op cannot take these arguments, or None."""
    if conv is None:
        return "there is no convolution, and PyTorch copies once"
    if reason := checks.unfit(h.device, h.dtype):
        return reason
    (weight, bias), C = conv, h.shape[2] // patch**2
    if weight.shape != (C, C, 3, 3) or bias.shape != (C,):
        return f"the convolution has weights {tuple(weight.shape)} and {tuple(bias.shape)}, the image {C} channels"
    if dtype not in IMAGES or any(w.dtype != h.dtype or w.device != h.device for w in conv):
        return f"the tokens are {h.dtype}, the convolution {weight.dtype} on {weight.device}, the image {dtype}"
    if h.numel() == 0 or math.isqrt(h.shape[1]) ** 2 != h.shape[1]:
        return f"the tokens {tuple(h.shape)} are no square image"
    return "a gradient is wanted" if wants_gradient(h, *conv) else None


def unpatchify(h: Tensor, patch: int, conv: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """Run the fused op: `reference`, rounded once, where PyTorch's convolution rounds to the tokens' dtype first.

    Args:
        h: (B, N, p p C) for N = (H / p)^2 patches, without a gradient; bf16 or fp16, as the convolution.
        patch: p.
        conv: weight (C, C, 3, 3) and bias (C,).
        dtype: of the result: bf16, fp16 or fp32.

    Returns:
        (B, C, H, H).

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("unpatchify", why_not(h, patch, conv, dtype))
    return run(h, patch, conv, dtype)


def run(h: Tensor, patch: int, conv: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Run `unpatchify` on arguments that `why_not` accepted."""
    return _op(h, patch, *conv, dtype)


@triton.jit
def _product(values, inside, weights, known):
    value = tl.load(values, mask=inside, other=0.0).to(tl.float32)
    return value[:, None] * tl.load(weights, mask=known, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _unpatchify_kernel(
    out,  # (B, C, SIDE, SIDE)
    h,  # (B, N, P P C), images `apart` elements apart, tokens `stride`
    weight,  # (C, C, 3, 3)
    bias,  # (C,)
    apart,
    stride,
    SIDE: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C up to a power of two
    PIXELS: tl.constexpr,
):
    image, pixel = tl.program_id(1).to(tl.int64), tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    total += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(9):
        y, x = pixel // SIDE + (tap // 3 - 1), pixel % SIDE + (tap % 3 - 1)
        inside = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
        at = h + image * apart + (y // P * (SIDE // P) + x // P) * stride + (y % P * P + x % P) * C
        if C <= 4:  # all loads at once
            for c in tl.static_range(C):
                total += _product(at + c, inside, weight + (channel * C + c) * 9 + tap, channel < C)
        else:
            for c in range(C):
                total += _product(at + c, inside, weight + (channel * C + c) * 9 + tap, channel < C)
    where = (image * C + channel[None, :]) * (SIDE * SIDE) + pixel[:, None]
    written = (pixel < SIDE * SIDE)[:, None] & (channel < C)[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=written)


def tile(side: int, patch: int, channels: int) -> dict[str, int]:
    """Return the kernel's constants and its warps."""
    padded = triton.next_power_of_2(channels)
    constants = {"SIDE": side, "P": patch, "C": channels, "CHANNELS": padded, "PIXELS": PIXELS}
    return {**constants, "num_warps": min(padded, 8)}


def _forward(h: Tensor, patch: int, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    out = _fake(h, patch, weight, bias, dtype)
    h = h if h.stride(2) == 1 else h.contiguous()
    B, C, side, _ = out.shape
    options = tile(side, patch, C)
    args = (out, h, weight.contiguous(), bias.contiguous(), h.stride(0), h.stride(1))
    launch.run(h.device, _unpatchify_kernel, (cdiv(side**2, PIXELS), B), args, options)
    return out


def _fake(h, patch, weight, bias, dtype):
    side = math.isqrt(h.shape[1]) * patch
    return h.new_empty(h.shape[0], len(bias), side, side, dtype=dtype)


_op = Constant("unpatchify", forward=_forward, fake=_fake)
