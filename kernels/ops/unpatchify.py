"""A network's last tokens as an image, and its final 3x3 convolution, in one launch, for sampling."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.runtime import checks, launch
from uvit_fast.kernels.runtime.launch import cdiv
from uvit_fast.kernels.runtime.op import Constant, wants_gradient

CHANNELS = 4  # at most: a pixel's 9 C products are written out
RESULTS = (torch.float32, torch.bfloat16, torch.float16)
_TILE = {"PIXELS": 64, "num_warps": 2}  # bound by its start: nothing to tune


def reference(h: Tensor, patch: int, conv: Linear | None, dtype: torch.dtype) -> Tensor:
    """Return the image (B, C, H, H) of tokens (B, N, p p C), row-major, convolved if there is a convolution.

    conv is its weight (C, C, 3, 3) and bias (C,), for images padded by a pixel.
    """
    side = round(h.shape[1] ** 0.5)
    image = rearrange(h, "B (h w) (p1 p2 C) -> B C h p1 w p2", h=side, p1=patch, p2=patch)  # a view
    if conv is None:  # cast and put in place by one copy
        image = image.to(dtype, memory_format=torch.contiguous_format)
    image = rearrange(image, "B C h p1 w p2 -> B C (h p1) (w p2)")  # (B, C, H, H)
    return image if conv is None else F.conv2d(image, *conv, padding=1).to(dtype)


def why_not(h: Tensor, patch: int, conv: Linear | None, dtype: torch.dtype) -> str | None:
    """Return why the fused op cannot take these arguments, or None."""
    if conv is None:
        return "without a convolution PyTorch copies once"
    C = h.shape[2] // patch**2
    if reason := checks.why_not(h.flatten()[:64], weight=(conv.weight, (C, C, 3, 3)), bias=(conv.bias, (C,))):
        return reason
    if C > CHANNELS or dtype not in RESULTS:
        return f"the image has {C} channels of {dtype}; the fused op writes {CHANNELS} of {RESULTS}"
    return "tokens or the convolution want a gradient" if wants_gradient(h, conv) else None
