"""The one door to the kernels: each op of a block, fused where that can run and plain PyTorch elsewhere.

`kernels="auto"` takes the fused op where it can take the tensors; "fused" insists and says why it cannot; "reference" is plain
PyTorch. The parameters are the same ones in every case, so a checkpoint never knows which of them ran.
"""

from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from uvit_fast.config import UserError
from uvit_fast.kernels.layernorm import fold as _layernorm
from uvit_fast.kernels.ops import assemble as _assemble
from uvit_fast.kernels.ops import linear_residual as _linear_residual
from uvit_fast.kernels.ops import ln_linear as _ln_linear
from uvit_fast.kernels.ops import ln_mlp as _ln_mlp
from uvit_fast.kernels.ops import proj_ln_mlp as _proj_ln_mlp
from uvit_fast.kernels.ops import skip_linear as _skip_linear
from uvit_fast.model.attention import choose


def fixed_weights() -> AbstractContextManager[None]:
    """While open, no weight changes: what the fused ops derive from weights alone is derived once."""
    return _layernorm.folded_once()


def assemble(x: Tensor, w: Tensor, b: Tensor, extras: Tensor, positions: Tensor, *, kernels: str = "auto") -> Tensor:
    """Concat(extras, patches of x) + positions: x (B, C, H, W), w (D, C, p, p), extras (B, E, D) -> (B, E + N, D)."""
    return _run(_assemble, kernels, x, w, b, extras, positions)


def ln_linear(x: Tensor, gamma: Tensor, beta: Tensor, w: Tensor, b: Tensor | None, *, kernels: str = "auto") -> Tensor:
    """Linear(LayerNorm(x)): x (..., D), w (N, D) -> (..., N)."""
    return _run(_ln_linear, kernels, x, gamma, beta, w, b)


def ln_mlp(
    x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, kernels: str = "auto"
) -> Tensor:
    """x + fc2(GELU(fc1(LayerNorm(x)))): x (..., D), w1 (4D, D), w2 (D, 4D) -> (..., D)."""
    return _run(_ln_mlp, kernels, x, gamma, beta, w1, b1, w2, b2)


def proj_ln_mlp(
    a: Tensor, w: Tensor, b: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, kernels: str = "auto"
) -> Tensor:  # fmt: skip
    """`linear_residual`, then `ln_mlp`; what is between them is computed again in the backward: x (..., D) -> (..., D)."""
    return _run(_proj_ln_mlp, kernels, a, w, b, x, gamma, beta, w1, b1, w2, b2)


def skip_linear(x: Tensor, skip: Tensor, w: Tensor, b: Tensor, *, kernels: str = "auto") -> Tensor:
    """Linear(Concat(x, skip)): x, skip (..., D), w (D, 2D) -> (..., D)."""
    return _run(_skip_linear, kernels, x, skip, w, b)


def linear_residual(a: Tensor, w: Tensor, b: Tensor, x: Tensor, *, kernels: str = "auto") -> Tensor:
    """x + Linear(a): a (..., K), w (D, K), x (..., D) -> (..., D)."""
    return _run(_linear_residual, kernels, a, w, b, x)


def describe(
    embed_dim: int, num_heads: int, attention: str, kernels: str, device: torch.device | str
) -> dict[str, str]:
    """What would run for each op of a network on `device`, and why: op -> "backend: reason". bf16 on a GPU, fp32 elsewhere.

    Raises:
        UserError: the backend or the fused kernels were asked for and cannot run there.
    """
    D, dtype = embed_dim, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    x, v, hidden = new(258, D), new(D), new(4 * D, D)
    reasons = {
        "ln_linear": _ln_linear.why_not(x, v, v, new(3 * D, D), None),
        "ln_mlp": _ln_mlp.why_not(x, v, v, hidden, new(4 * D), new(D, 4 * D), v),
        "skip_linear": _skip_linear.why_not(x, x, new(D, 2 * D), v),
        "linear_residual": _linear_residual.why_not(x, new(D, D), v, x),
        "assemble": _assemble.why_not(new(1, 4, 32, 32), new(D, 4, 2, 2), v, new(1, 2, D), new(1, 258, D)),
    }
    chosen = {"attention": ": ".join(choose(new(1, 258, 3, num_heads, D // num_heads), attention))}
    for op, reason in reasons.items():
        if kernels == "reference":
            chosen[op] = "reference: asked for"
        else:
            if reason and kernels == "fused":
                raise UserError(f"model.kernels=fused: {op} cannot run: {reason}")
            chosen[op] = "fused" if reason is None else f"reference: {reason}"
    return chosen


def _run(op: ModuleType, kernels: str, *tensors: Tensor | None) -> Tensor:
    """op.<name>, the fused op of module `op`, or op.reference."""
    name = op.__name__.rpartition(".")[2]
    if kernels == "reference":
        return op.reference(*tensors)
    reason = op.why_not(*tensors)
    if reason is None:
        return getattr(op, name)(*tensors)
    if kernels == "fused":
        raise UserError(f"model.kernels=fused: {name} cannot run: {reason}")
    return op.reference(*tensors)
