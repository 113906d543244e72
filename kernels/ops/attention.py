"""Attention of short sequences on packed qkv: all keys of a head are on the chip at once."""

import torch
from torch import Tensor

from uvit_fast.kernels.attention import core
from uvit_fast.kernels.runtime import checks
from uvit_fast.kernels.runtime.checks import ACCUMULATE, aligned
from uvit_fast.kernels.runtime.device import capability, interpreting
from uvit_fast.kernels.runtime.op import Op

LONGEST = 512  # tokens; past it the chip no longer holds a head


def reference(qkv: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v per head, in plain PyTorch.

    Args:
        qkv: (B, L, 3, H, D), q, k and v as one linear layer writes them; any device and float dtype.

    Returns:
        (B, L, H*D), the heads side by side.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, D)
    p = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)  # (B, H, L, L)
    return (p @ v).transpose(1, 2).flatten(2)  # (B, L, H*D)


def why_not(qkv: Tensor) -> str | None:
    """Return why the fused op cannot take qkv, or None."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        return f"qkv is (B, L, 3, H, D), got {tuple(qkv.shape)}"
    if qkv.device.type != "cuda" and not interpreting():
        return f"it runs on CUDA, got a tensor on {qkv.device.type}"
    if qkv.dtype not in (torch.bfloat16, torch.float16) and not (interpreting() and qkv.dtype == torch.float32):
        return f"it takes bfloat16 and float16, got {qkv.dtype}"
    L, D = qkv.shape[1], qkv.shape[-1]
    if D % 8 or D > 128:
        return f"the head dim must be a multiple of 8 up to 128, got {D}"
    if L > LONGEST:
        return f"it takes at most {LONGEST} tokens, got {L}"
    if qkv.numel() == 0:
        return f"qkv is empty: {tuple(qkv.shape)}"
    if qkv.device.type == "cuda" and capability(qkv.device.index) not in (8, 9):
        return "its kernels are for compute capability 8 and 9"
    return checks.forward_mode()


def attention(qkv: Tensor) -> Tensor:
    """Run the fused op, `reference` in one kernel; its backward is two.

    Saves qkv, the output and an fp32 log-sum-exp per row.

    Args:
        qkv: (B, L, 3, H, D), bf16 or fp16, L <= 512, D a multiple of 8 up to 128.

    Returns:
        (B, L, H*D).

    Raises:
        ValueError: with the reason of `why_not`.
    """
    checks.refuse("attention", why_not(qkv))
    return run(qkv)


def run(qkv: Tensor) -> Tensor:
    """Run `attention` on qkv that `why_not` accepted."""
    return _op(qkv)[0]


def _forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return core(qkv.device, qkv.shape[-1]).forward(aligned(qkv))


def _fake(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, L, _, H, D = qkv.shape
    return qkv.new_empty(B, L, H * D), qkv.new_empty(B, H, L, dtype=ACCUMULATE)


def _backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    return core(qkv.device, qkv.shape[-1]).backward(aligned(qkv), out, lse, aligned(dout))


def _fake_backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx, backward, dout: Tensor) -> tuple[Tensor]:
    return (backward(*ctx.saved_tensors, dout),)


_op = Op(
    "attention",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_backward=_fake_backward,
    save=_save,
    gradient=_gradient,
)
