"""Activation checkpointing: what a block keeps for its backward, and what it recomputes there.

"none" keeps everything and recomputes nothing. "block" keeps the block's input alone. "selective" also keeps what costs
most to recompute per byte, the attention's output (D values per token) and fc1's before its GELU (4 D), so that
attention and the MLP run once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from uvit_fast.model import ops


def recomputed(function: Callable, policy: str, hidden: int, *inputs: Tensor | None) -> Any:
    """Return function(*inputs), checkpointed with "selective" or "block" as above.

    Args:
        function: a block's forward, which draws no random numbers and ends with its MLP.
        hidden: width of fc1's output, which identifies its product where PyTorch's op computes it.
    """
    contexts: dict[str, Any] = {}
    if policy == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, hidden))
    elif not torch.compiler.is_compiling():
        contexts["context_fn"] = lambda: (ops.one_by_one(), _WithoutFc2())
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)


def _policy(hidden: int, context, op, *args, **kwargs) -> CheckpointPolicy:
    """Save the outputs named above. The fused MLP returns fc1's beside its own, which the next block keeps as input."""
    namespace, _, name = op.name().partition("::")
    attention = "attention" in name or namespace == "flash_attn"
    fc1 = (name == "addmm" and args[2].shape[1] == hidden) or (name == "linear" and args[1].shape[0] == hidden)
    return CheckpointPolicy.MUST_SAVE if attention or fc1 or name == "ln_mlp" else CheckpointPolicy.PREFER_RECOMPUTE


class _WithoutFc2(TorchDispatchMode):
    """In the recomputation, run the fused MLP up to fc1 only: the block's output, which fc2 gives, is there already.

    PyTorch's own ops need no such help: recomputation stops at the last tensor that the backward needs.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() != "uvit_fast::ln_mlp":
            return func(*args, **(kwargs or {}))
        x, gamma, beta, eps, w1, b1, _, _, sums, _ = args
        half = 0.5  # the fused MLP keeps half of the GELU's argument
        h, statistics = torch.ops.uvit_fast.ln_linear.default(x, gamma, beta, eps, w1, b1, sums, half, True)
        return x.new_empty(x.shape), statistics.new_empty(0), statistics, h.view(-1, h.shape[-1])
