"""The one door to the kernels: each op of a block, fused where that can run, in plain PyTorch elsewhere.

`kernels="auto"` takes the fused op where it supports the tensors; "fused" insists on it, or says why it cannot run;
"reference" is plain PyTorch. The parameters are the same in every case, so a checkpoint does not depend on the choice.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.kernels.layernorm import fold as _layernorm
from uvit_fast.kernels.layernorm.refold import Derived as Derived
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops import assemble as _assemble
from uvit_fast.kernels.ops import block as _block
from uvit_fast.kernels.ops import linear_residual as _linear_residual
from uvit_fast.kernels.ops import ln_linear as _ln_linear
from uvit_fast.kernels.ops import ln_mlp as _ln_mlp
from uvit_fast.kernels.ops import proj_ln_mlp as _proj_ln_mlp
from uvit_fast.kernels.ops import skip_linear as _skip_linear
from uvit_fast.kernels.ops import timestep_embedding as _timestep_embedding
from uvit_fast.kernels.ops import unpatchify as _unpatchify
from uvit_fast.kernels.runtime import checks as _checks
from uvit_fast.kernels.runtime import launch as _launch
from uvit_fast.kernels.runtime.checks import forward_mode as forward_mode
from uvit_fast.kernels.runtime.device import architecture as architecture
from uvit_fast.model.attention import choose
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.hooks import plain_weights


def fixed_weights() -> AbstractContextManager[None]:
    """Promise that no weight changes inside: what the fused ops derive from the weights alone is derived once."""
    return _layernorm.folded_once()


def compile_ahead(device: torch.device, network: nn.Module, run: Callable[[], object]) -> None:
    """Compile at once what run(), calls of a network, would launch on a GPU; no kernel of ours is launched, and its
    results mean nothing. Where PyTorch computes all but attention there is nothing to gain, and run() is not called.

    What fails, for want of memory or otherwise, fails where it is computed, or does not.
    """
    if device.type == "cuda" and _may_fuse(network):
        with contextlib.suppress(RuntimeError), fixed_weights(), _launch.ahead():
            run()


def _may_fuse(network: nn.Module) -> bool:
    """Return whether some module may run fused ops by its setting, and some weight by its dtype and device."""
    asked = any(getattr(module, "kernels", "reference") != "reference" for module in network.modules())
    return asked and any(_checks.why_not(weight) is None for weight in network.parameters())


def layer(module: nn.Module, bias: bool = True) -> Norm | Linear | None:
    """Return a LayerNorm's or linear layer's weights for the ops below, or None where calling it does more than its
    formula (`hooks.plain_weights`).
    """
    weights = plain_weights(module, bias=bias)
    return None if weights is None else (Norm if type(module) is nn.LayerNorm else Linear)(*weights)


_CONV3X3 = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def conv3x3(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the weight and bias of a 3x3 convolution that pads by a pixel of zeros, or None where calling it does
    something else.
    """
    weights = plain_weights(module)
    if weights is None or type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        return None
    return weights if all(getattr(module, name) == value for name, value in _CONV3X3.items()) else None


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype, *, kernels: str = "auto") -> Tensor:
    """Return the sinusoidal embedding of times (B,), which may be fractional, cosines first: (B, dim), dim even."""
    return _chosen(_timestep_embedding, kernels, t, dim, dtype)(t, dim, dtype)


def assemble(
    x: Tensor, w: Tensor, b: Tensor, extras: Sequence[Tensor], positions: Tensor, *, kernels: str = "auto"
) -> Tensor:
    """Return Concat(extras, patches of x (B, C, H, W)) + positions, (B, E + N, D); w (D, C, p, p). The extras are
    (B, E, D), or two such tensors; x is rounded to their dtype.
    """
    return _chosen(_assemble, kernels, x, w, b, extras, positions)(x, w, b, extras, positions)


def unpatchify(
    h: Tensor, patch: int, conv: tuple[Tensor, Tensor] | None, dtype: torch.dtype, *, kernels: str = "auto"
) -> Tensor:
    """Return the image (B, C, H, H) of tokens h (B, N, p p C), in `dtype`, through a 3x3 convolution's weight and bias
    if there is one.
    """
    run = _unpatchify.reference if conv is None else _chosen(_unpatchify, kernels, h, patch, conv, dtype)
    return run(h, patch, conv, dtype)


def ln_linear(x: Tensor, norm: Norm, linear: Linear, sums: Tensor | None = None, *, kernels: str = "auto") -> Tensor:
    """Return Linear(LayerNorm(x)): x (..., D), weight (N, D) -> (..., N). `sums` are those that came with x."""
    run = _chosen(_ln_linear, kernels, x, norm, linear)
    return run(x, norm, linear) if run is _ln_linear.reference else run(x, norm, linear, sums)


def ln_mlp(
    x: Tensor, norm: Norm, fc1: Linear, fc2: Linear, sums: Tensor | None = None, *, kernels: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Return x + fc2(GELU(fc1(LayerNorm(x)))): x (..., D) -> (..., D), and its sums for the next LayerNorm, if a fused
    op computed them.
    """
    run = _chosen(_ln_mlp, kernels, x, norm, fc1, fc2)
    return (run(x, norm, fc1, fc2), None) if run is _ln_mlp.reference else run(x, norm, fc1, fc2, sums)


def proj_ln_mlp(
    a: Tensor, proj: Linear, x: Tensor, norm: Norm, fc1: Linear, fc2: Linear, *, kernels: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Run `linear_residual`, then `ln_mlp`: x (..., D) -> (..., D), sums. The backward recomputes what is between."""
    return _with_sums(_proj_ln_mlp, kernels, a, proj, x, norm, fc1, fc2)


one_by_one = _block.one_by_one  # a context in which `block` does not run


def block(
    x: Tensor,
    skip: Tensor | None,
    sums: Tensor | None,
    layers: tuple[Linear | None, tuple[Norm, Linear] | None, Linear | None, tuple[Norm, Linear, Linear] | None],
    attention: nn.Module,
    *,
    kernels: str,
) -> tuple[Tensor, Tensor] | None:
    """Run a whole block as one op, x and skip (B, L, D) -> (B, L, D), sums; None if its parts must be called.

    Args:
        layers: of the skip, before attention, after it, and of the MLP; None for those that must be called.
        attention: an `Attention` where `layers` has its layers.
    """
    joined, norm1_qkv, proj, norm2_mlp = layers
    if kernels == "reference" or (joined is None) != (skip is None) or not (norm1_qkv and proj and norm2_mlp):
        return None
    if attention.backend not in ("auto", "fused"):
        return None
    return _block.run(x, skip, sums, (joined, *norm1_qkv, proj, *norm2_mlp), attention.num_heads)


def skip_linear(x: Tensor, skip: Tensor, linear: Linear, *, kernels: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Return Linear(Concat(x, skip)): x, skip (..., D), weight (D, 2D) -> (..., D), sums."""
    return _with_sums(_skip_linear, kernels, x, skip, linear)


def linear_residual(a: Tensor, linear: Linear, x: Tensor, *, kernels: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Return x + Linear(a): a (..., K), weight (D, K), x (..., D) -> (..., D), sums."""
    return _with_sums(_linear_residual, kernels, a, linear, x)


def describe(
    embed_dim: int, num_heads: int, attention: str, kernels: str, device: torch.device | str
) -> dict[str, str]:
    """Return what would run for each op of a network on `device`, and why: op -> "backend: reason". bf16 on a GPU, fp32
    elsewhere.

    Raises:
        UserError: the backend or the fused kernels were requested and cannot run there.
    """
    D, dtype = embed_dim, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    conv = new(4, 4, 3, 3), new(4)
    extra, image = [new(1, 1, D)] * 2, torch.empty(1, 4, 32, 32, device=device)
    x, norm, proj = new(258, D), Norm(new(D), new(D)), Linear(new(D, D), new(D))
    fc1, fc2 = Linear(new(4 * D, D), new(4 * D)), Linear(new(D, 4 * D), new(D))
    reasons = {
        "ln_linear": _ln_linear.why_not(x, norm, Linear(new(3 * D, D))),
        "ln_mlp": _ln_mlp.why_not(x, norm, fc1, fc2),
        "skip_linear": _skip_linear.why_not(x, x, Linear(new(D, 2 * D), new(D))),
        "linear_residual": _linear_residual.why_not(x, proj, x),
        "timestep_embedding": _timestep_embedding.why_not(image[:, 0, 0, 0], D, dtype),
        "assemble": _assemble.why_not(image, new(D, 4, 2, 2), new(D), extra, new(1, 258, D)),
        "unpatchify": _unpatchify.why_not(new(1, 256, 16), 2, conv, torch.float32),
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


def _chosen(op: ModuleType, kernels: str, *args: Any) -> Callable:
    """Return op.run, the fused op on arguments that were checked, or op.reference."""
    if kernels == "reference":
        return op.reference
    reason = op.why_not(*args)
    if reason is None:
        return op.run
    if kernels == "fused":
        raise UserError(f"model.kernels=fused: {op.__name__.rpartition('.')[2]} cannot run: {reason}")
    return op.reference


def _with_sums(op: ModuleType, kernels: str, *args: Tensor | Norm | Linear) -> tuple[Tensor, Tensor | None]:
    run = _chosen(op, kernels, *args)
    return (run(*args), None) if run is op.reference else run(*args)
