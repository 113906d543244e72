"""What a block keeps for its backward, and what it computes again there.

"none": everything is kept, nothing is computed again. "block": the block's input alone. "selective": also what costs most to compute a
byte, the attention's output (D values a token) and fc1's before its GELU (4 D), so that attention and the MLP run once.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

POLICIES = ("none", "selective", "block")  # from the most memory to the least


def recomputed(function: Callable[..., Tensor], policy: str, hidden: int, *inputs: Tensor | None) -> Tensor:
    """function(*inputs) with "selective" or "block" as above.

    Args:
        function: a block's forward, without random numbers.
        hidden: fc1's outputs, by which its product is known where it is an op of PyTorch.
    """
    contexts = {}
    if policy == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, hidden))
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)


def _policy(hidden: int, context, op, *args, **kwargs) -> CheckpointPolicy:
    """The fused MLP gives fc1's output beside its own, which the next block keeps as its input."""
    namespace, _, name = op.name().partition("::")
    attention = "attention" in name or namespace == "flash_attn"
    fc1 = name.startswith(("addmm", "linear")) and context.op_output.shape[-1] == hidden
    return CheckpointPolicy.MUST_SAVE if attention or fc1 or name == "ln_mlp" else CheckpointPolicy.PREFER_RECOMPUTE
