"""Attention of short sequences, from packed qkv as the linear layer writes it."""

import torch
from torch import Tensor


def reference(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head: qkv (B, L, 3, H, D) -> (B, L, H * D); the softmax is fp32."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, L, L)
    p = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return (p @ v).transpose(1, 2).flatten(2)  # (B, L, H * D)
