"""A U-ViT whose blocks' products are of e4m3 operands: sampling in FP8 on compute capability 9.0.

The first and the last layers, LayerNorm's statistics, softmax and the residual stream stay in bf16 and fp32. The weights
are derived once from the network's, which never change: its checkpoint stays the published one.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.kernels.gemm.fp8 import Made
from uvit_fast.kernels.ops import attention, fp8_block
from uvit_fast.model.uvit import Block, UViT
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.hooks import hooked, hooked_everywhere


def check(model: Any, device: torch.device | None) -> None:
    """Refuse what the kernels are not for.

    Args:
        model: a UViT, or what it is made of by name.
        device: that runs it; None: any, by `fp8_block.REFERENCE`.

    Raises:
        UserError: another device than of compute capability 9.0, or widths or a number of tokens that no kernel takes.
    """
    widths = (model.embed_dim, model.num_heads, int(model.embed_dim * model.mlp_ratio))
    reason = fp8_block.unfit(*widths) if device is None else fp8_block.why_not(*widths, device)
    extras = 1 + bool(model.num_classes) + (model.context_tokens if model.context_dim else 0)
    tokens = extras + (model.img_size // model.patch_size) ** 2
    if reason is None and tokens > attention.LONGEST:
        reason = f"its attention takes at most {attention.LONGEST} tokens, got {tokens}"
    if reason is None and model.skip == "add":
        reason = "skips that are added (model.skip=add) go through no product"
    if reason:
        raise UserError(f"sample.precision=fp8: {reason}; expected bf16")


class Fp8UViT(nn.Module):
    """The noise prediction network eps(x_t, t, c) of a trained one, called as that is; without gradients.

    Args:
        net: in bf16, on the device that will run it.
        by: who computes the blocks: the kernels, or to compare with them `fp8_block.REFERENCE`, anywhere.

    Raises:
        UserError: as `check`; a network of another dtype, or with a block that was changed (hooks, LoRA, ...).
    """

    def __init__(self, net: UViT, by: fp8_block.Arithmetic = fp8_block.KERNELS):
        super().__init__()
        check(net, net.pos_embed.device if by is fp8_block.KERNELS else None)
        if net.pos_embed.dtype != torch.bfloat16:
            raise UserError(f"sample.precision=fp8: expected a network in bfloat16, got {net.pos_embed.dtype}")
        if hooked(net) or hooked_everywhere():
            raise UserError("sample.precision=fp8: the network has hooks, which would not be called; expected bf16")
        self.net, self.by = net, by
        self.layers = [_derived(i, block) for i, block in enumerate(net.blocks)]

    def fixed_weights(self) -> AbstractContextManager[None]:
        """As `UViT.fixed_weights`: what is derived of the last layers is derived once."""
        return self.net.fixed_weights()

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Predict the noise: see `UViT.forward`."""
        net, last = self.net, len(self.layers) - 1
        h = net.tokens(x, t, y, context)  # (B, L, D)
        B, L, D = h.shape
        skips: list = []  # of the first half
        h = Made(h.reshape(B * L, D), None, None)
        for i, layers in enumerate(self.layers):
            skip = skips.pop() if layers.skip else None
            # a block with a skip reads e4m3 alone, the last layer bf16 alone
            wide = i == last or self.layers[i + 1].skip is None
            h = fp8_block.block(h, skip, layers, B, net.num_heads, wide=wide, narrow=i != last, by=self.by)
            if i < len(self.layers) // 2:
                skips.append(h.narrow)
        return net.noise(h.wide.view(B, L, D), h.sums).to(x.dtype)


def _derived(index: int, block: Block) -> fp8_block.Layers:
    skip, attention, proj, rest = block._layers()
    if not (attention and rest and (skip or block.skip_linear is None)):
        raise UserError(
            f"sample.precision=fp8: block {index} was changed (hooks, LoRA, ...), which the kernels would not call; expected bf16"
        )
    return fp8_block.derive(*attention, proj, *rest, skip, heads=block.attn.num_heads)
