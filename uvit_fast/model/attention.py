"""Attention backends, by name. All take packed qkv (B, L, 3, H, D) as the linear layer writes it, and return
(B, L, H * D).

"auto" takes the first one that can run, in the measured order of benchmarks/results/attention.csv: fused, cudnn,
flash_attn, sdpa.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uvit_fast.kernels.ops import attention as fused_attention
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.extras import install

HALF = (torch.float16, torch.bfloat16)


def attend(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for every head.

    Args:
        qkv: (B, L, 3, H, D).
        backend: a name of `BACKENDS`, or "auto".

    Returns:
        (B, L, H * D), in qkv's dtype.

    Raises:
        UserError: the backend was requested by name and cannot run on qkv.
        ImportError: its package is not installed; the message names the extra.
    """
    return BACKENDS[choose(qkv, backend)[0]](qkv)


def choose(qkv: Tensor, backend: str = "auto") -> tuple[str, str]:
    """Return the backend that `attend` would run on qkv, and why: (name, reason)."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise UserError(f"model.attention: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = _why_not(backend, qkv)
        if reason:
            raise UserError(f"model.attention={backend} cannot run: {reason}")
        return backend, "asked for"
    passed_over: list[str] = []
    for name in ("fused", "cudnn", "flash_attn"):
        reason = _why_not(name, qkv)
        if reason is None:
            return name, "; ".join(passed_over) or "the fastest that was measured"
        passed_over.append(f"not {name}: {reason}")
    on_gpu = qkv.device.type == "cuda"
    return "sdpa", "; ".join(passed_over) if on_gpu else f"the others need a GPU, got {_name(qkv)}"


def _why_not(backend: str, qkv: Tensor) -> str | None:
    if backend == "fused":
        return fused_attention.why_not(qkv)
    if backend == "flash_attn" or backend == "xformers":
        if qkv.device.type != "cuda" or qkv.dtype not in HALF:
            return f"needs fp16 or bf16 on a GPU, got {_name(qkv)}"
        if find_spec(backend) is None:
            return f"the package is not installed; {install(backend.replace('_', '-'))}"
    if backend == "cudnn":
        if qkv.device.type != "cuda" or qkv.dtype not in HALF:
            return f"needs fp16 or bf16 on a GPU, got {_name(qkv)}"
        if qkv.shape[-1] > 128:
            return f"needs heads of at most 128, got {qkv.shape[-1]}"
    return None


def _name(qkv: Tensor) -> str:
    return f"{str(qkv.dtype).removeprefix('torch.')} on {qkv.device.type}"


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _cudnn(qkv: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(qkv)


def _flash_attn(qkv: Tensor) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv).flatten(2)


def _xformers(qkv: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.unbind(2)  # (B, L, H, D) each
    return memory_efficient_attention(q, k, v).flatten(2)


BACKENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "fused": fused_attention.attention,
    "flash_attn": _flash_attn,
    "cudnn": _cudnn,
    "sdpa": _sdpa,
    "xformers": _xformers,
    "math": fused_attention.reference,
}
