"""The sinusoidal embedding of the time (paper, Appendix; as in DDPM) in one launch, in the network's dtype.

A fractional time of 999 turns an error of 1e-7 in a frequency into one of 1e-4 in an angle, which shows in bf16: the
kernel computes as PyTorch does on a GPU, operation by operation, with CUDA's expf, cosf and sinf.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from uvit_fast.kernels.runtime import checks, launch
from uvit_fast.kernels.runtime.device import interpreting
from uvit_fast.kernels.runtime.launch import cdiv
from uvit_fast.kernels.runtime.op import Constant

LOG_PERIOD = math.log(10_000)
_TIMES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64)
_BLOCK = 128  # frequencies a program, one a thread
_INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


def reference(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the embedding of t (B,), cosines first: (B, dim), computed in fp32."""
    half = dim // 2
    freqs = torch.exp(-LOG_PERIOD * torch.arange(half, device=t.device, dtype=torch.float32) / half)  # (dim/2,)
    angles = t.float()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)  # (B, dim)


def why_not(t: Tensor, dim: int, dtype: torch.dtype) -> str | None:
    """Return why the fused op cannot take these arguments, or None."""
    if reason := checks.unfit(t.device, dtype):
        return reason
    if t.dtype not in _TIMES:
        return f"the time is {t.dtype}"
    if t.numel() == 0 or dim % 2:
        return f"there are {t.numel()} times and {dim} values for each"
    if torch.is_grad_enabled() and t.requires_grad:
        return "the time wants a gradient"
    return None


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Run the fused op: `reference` with the bits that PyTorch computes on a GPU.

    There a division by a number is a product with its reciprocal. So the CPU's reference differs, by a few ulp of a
    frequency where dim / 2 is no power of two, and by its own exp, cos and sin: up to 1e-4 at t = 999, in fp32.

    Args:
        t: (B,), floating-point, int32 or int64, with any stride; without a gradient.
        dim: even.
        dtype: of the result: bf16 or fp16.

    Returns:
        (B, dim).

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("timestep_embedding", why_not(t, dim, dtype))
    return run(t, dim, dtype)


@triton.jit
def _exp(x):
    """Return expf; on a GPU tl.exp is an approximation."""
    return tl.exp(x) if _INTERPRETED else libdevice.exp(x)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["t"])
def _timestep_kernel(
    out,  # (B, 2 HALF)
    t,  # (B,)
    stride,  # of t
    rate,  # -log(10,000)
    inverse,  # 1 / HALF
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    angle = tl.load(t + row * stride).to(tl.float32) * _exp(i.to(tl.float32) * rate * inverse)
    at = out + row.to(tl.int64) * 2 * HALF + i
    tl.store(at, tl.cos(angle).to(out.dtype.element_ty), mask=i < HALF)
    tl.store(at + HALF, tl.sin(angle).to(out.dtype.element_ty), mask=i < HALF)


def _forward(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    out, half = t.new_empty(t.shape[0], dim, dtype=dtype), dim // 2
    options = {"HALF": half, "BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    args = (out, t, t.stride(0), -LOG_PERIOD, 1 / half)
    launch.run(t.device, _timestep_kernel, (t.shape[0], cdiv(half, _BLOCK)), args, options)
    return out


def _fake(t, dim, dtype):
    return t.new_empty(t.shape[0], dim, dtype=dtype)


run = Constant("timestep_embedding", forward=_forward, fake=_fake)
