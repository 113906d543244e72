"""Attention of short sequences on packed qkv: every key of a head is on the chip at once."""

import torch
from torch import Tensor


def reference(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v per head, in plain PyTorch.

    Args:
        qkv: (B, L, 3, H, D), q, k and v as one linear layer writes them; any device and float dtype.

    Returns:
        (B, L, H*D), the heads side by side.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, D)
    p = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)  # (B, H, L, L)
    return (p @ v).transpose(1, 2).flatten(2)  # (B, L, H*D)


def why_not(qkv: Tensor) -> str | None:
    """Why the fused op cannot take qkv; None where it can."""
    return "no fused attention is built in yet"


def attention(qkv: Tensor) -> Tensor:
    """The fused op: the same function as `reference`, where `why_not` has no objection."""
    raise ValueError(f"attention: {why_not(qkv)}")
