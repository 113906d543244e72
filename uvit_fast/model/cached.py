"""A U-ViT's blocks with attentions and MLPs that may reuse their output from an earlier evaluation.

What is kept is what the sublayer added to the residual stream, `after - before`: the fused ops add it themselves, and
an evaluation with a cache computes what one without computes, bit for bit. The subtraction is one pass over the stream,
only in evaluations that are reused later; an evaluation that reuses an output adds it and launches nothing else of the
sublayer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.hooks import changed

if TYPE_CHECKING:
    from uvit_fast.model.uvit import Block, UViT

Sums = Tensor | None
Through = Callable[[Any, Tensor, Tensor | None, Sums], tuple[Tensor, Sums]]


class Cache(Protocol):
    """What one evaluation reuses and keeps, by the names of `sublayers`."""

    def find(self, name: str, rows: int) -> Tensor | None:
        """Return the output to reuse, (rows, L, D), or None if it must be computed."""

    def wants(self, name: str) -> bool:
        """Return whether to keep an output that is computed."""

    def leave(self, name: str, before: Tensor, after: Tensor) -> None:
        """Keep the difference of the stream after and before a sublayer."""


def block_names(depth: int) -> list[str]:
    """Return the blocks of a U-ViT of the paper's `depth` in execution order, named as its parameters."""
    half = range(depth // 2)
    return [*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)]


def sublayers(depth: int) -> list[str]:
    """Return the names that a plan may use, in execution order: "in_blocks.0.attn", "in_blocks.0.mlp", ..."""
    return [f"{block}.{part}" for block in block_names(depth) for part in ("attn", "mlp")]


def through(net: UViT, cache: Cache) -> Through:
    """Return the function that takes a stream through a block of `net`, (block, x, skip, sums) -> x, sums, using
    `cache`.

    Raises:
        UserError: with gradients, as in checkpointing; under torch.compile; for a network with hooks or adapters.
    """
    why = None
    if any(module.__dict__.get("_compiled_call_impl") for module in (net, *net.blocks)):
        why = "blocks under torch.compile are called whole"
    elif torch.is_grad_enabled() and any(weight.requires_grad for weight in net.parameters()):
        why = "there is no way back through outputs of another evaluation (gradients, activation checkpointing)"
    elif found := changed(net, inside=True):
        why = f"{found}, which would not be called where its output is reused"
    if why:
        raise UserError(f"sample.cache: {why}; expected none, or a plain network that samples")
    names = dict(zip(net.blocks, block_names(net.depth)))

    def step(block: Block, x: Tensor, skip: Tensor | None, sums: Sums) -> tuple[Tensor, Sums]:
        skip_linear, norm1_qkv, proj, norm2_mlp = block._layers()
        x, sums = block.joined(x, skip, sums, skip_linear)
        x, sums = sublayer(f"{names[block]}.attn", x, sums, lambda x, sums: block.attended(x, sums, norm1_qkv, proj))
        return sublayer(f"{names[block]}.mlp", x, sums, lambda x, sums: block.through_mlp(x, sums, norm2_mlp))

    def sublayer(name: str, x: Tensor, sums: Sums, compute: Callable[[Tensor, Sums], tuple[Tensor, Sums]]):
        if (reused := cache.find(name, len(x))) is not None:
            return x + reused, None
        after, sums = compute(x, sums)
        if cache.wants(name):
            cache.leave(name, x, after)
        return after, sums

    return step
