"""What every fused op asks of its tensors."""

import torch
from torch import Tensor

from uvit_fast.kernels.runtime.device import capability, interpreting

ACCUMULATE = torch.float32  # statistics, sums and partial results


def why_not(x: Tensor, weights: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> str | None:
    """The objection that all fused ops share, or None.

    Args:
        x: (..., D), the op's first input.
        weights: name -> tensor and the shape that it must have; the tensor may be None.
    """
    if x.device.type != "cuda" and not interpreting():
        return f"the tensors are on {x.device.type}; the fused ops run on CUDA"
    if x.device.type == "cuda" and capability(x.device.index) < 8:
        return "the device is older than compute capability 8.0"
    if x.dtype not in (torch.bfloat16, torch.float16) and not (interpreting() and x.dtype == torch.float32):
        return f"the dtype is {x.dtype}; the fused ops take bfloat16 and float16"
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if x.shape[-1] % 64:
        return f"the width {x.shape[-1]} is no multiple of 64"
    for name, (tensor, shape) in weights.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"{name} has the shape {tuple(tensor.shape)}, not {shape}"
        if tensor.dtype != x.dtype or tensor.device != x.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}"
    return None


def rows(x: Tensor) -> Tensor:
    """(..., D) as contiguous, 16-byte aligned rows (tokens, D); copies only where the layout asks for it."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat.clone() if x.device.type == "cuda" and flat.data_ptr() % 16 else flat
