"""What every fused op requires of its tensors."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.runtime.device import capability, interpreting

ACCUMULATE = torch.float32  # statistics, sums and partial results


def forward_mode() -> str | None:
    """Return why no fused op runs where derivatives are taken in forward mode, as by torch.func.jvp, or None."""
    if forward_ad._current_level < 0:
        return None
    return "derivatives are taken in forward mode, in which the fused ops would count as constant"


def unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no fused op runs on a device, or for a network of this dtype, or None."""
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device.type}; the fused ops run on CUDA"
    if device.type == "cuda" and capability(device.index) < 8:
        return "the device is older than compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16) and not (interpreting() and dtype == torch.float32):
        return f"the dtype is {dtype}; the fused ops take bfloat16 and float16"
    return forward_mode()


def why_not(x: Tensor, /, **others: tuple[Tensor | Norm | Linear, tuple[int, ...] | int]) -> str | None:
    """Return the reason for which any fused op would refuse these tensors, or None.

    Args:
        x: (..., D), the op's first input.
        others: a tensor and its shape, a Norm and its width, or a Linear and its weight's shape (N, K).
    """
    if reason := unfit(x.device, x.dtype):
        return reason
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if x.shape[-1] % 64:
        return f"the width {x.shape[-1]} is no multiple of 64"
    for name, (given, shape) in others.items():
        if isinstance(given, Norm):
            parts = ((".weight", given.weight, (shape,)), (".bias", given.bias, (shape,)))
        elif isinstance(given, Linear):
            parts = ((".weight", given.weight, shape), (".bias", given.bias, shape[:1]))
        else:
            parts = (("", given, shape),)
        for part, tensor, wanted in parts:
            if tensor is None:
                continue
            if tensor.shape != wanted:
                return f"{name}{part} has the shape {tuple(tensor.shape)}, not {wanted}"
            if tensor.dtype != x.dtype or tensor.device != x.device:
                return f"{name}{part} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}"
    return None


def narrow(N: int, multiple: int) -> str | None:
    """Return what is wrong with an output's width, or None."""
    return f"the output's width {N} is no multiple of {multiple}" if N % multiple else None


def refuse(op: str, reason: str | None) -> None:
    """Raise a ValueError with the op's name and the reason, if there is one."""
    if reason:
        raise ValueError(f"{op}: {reason}")


def aligned(x: Tensor) -> Tensor:
    """Return x contiguous and, as TMA requires, on a 16-byte boundary; copy only if it is not both."""
    x = x.contiguous()
    return x.clone() if x.device.type == "cuda" and x.data_ptr() % 16 else x


def rows(x: Tensor) -> Tensor:
    """Return (..., D) as `aligned` rows (tokens, D)."""
    return aligned(x.reshape(-1, x.shape[-1]))
