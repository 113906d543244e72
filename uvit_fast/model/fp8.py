"""A U-ViT whose blocks' products are of e4m3 operands: sampling in FP8 on compute capability 9.0.

The first and the last layers, LayerNorm's statistics, softmax and the residual stream stay in the network's own dtypes.
Weights are derived once from the network's, which never change: its checkpoint stays the published one.
"""

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.config import UserError
from uvit_fast.kernels.gemm.fp8 import Made
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model.uvit import Block, UViT


class Fp8UViT(nn.Module):
    """The noise prediction network eps(x_t, t, c) of a trained one, called as that is; without gradients.

    Args:
        net: a `UViT` in bf16 on the device that will run it.
        by: who computes the blocks: the kernels, or for a test `fp8_block.REFERENCE`.

    Raises:
        UserError: the device or the network's widths are not what the kernels are for, or a block was changed.
    """

    fixed_weights = staticmethod(UViT.fixed_weights)

    def __init__(self, net: UViT, by: fp8_block.Arithmetic = fp8_block.KERNELS):
        super().__init__()
        first = net.blocks[0]
        D, device, heads = net.embed_dim, net.pos_embed.device, first.attn.num_heads
        reason = fp8_block.why_not(D, heads, first.hidden, device) if by is fp8_block.KERNELS else None
        if reason is None and net.skip == "add":
            reason = "model.skip=add has no product for its skips"
        if reason:
            raise UserError(f"sample.precision=fp8: {reason}; expected bf16 there")
        self.net, self.by, self.heads = net.eval().requires_grad_(False), by, heads
        self.layers = [_derived(i, block, heads) for i, block in enumerate(net.blocks)]
        self.image, self.text, self.num_classes = net.image, net.text, net.num_classes

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Predict the noise: see `UViT.forward`."""
        net = self.net
        h = net.tokens(x, t, y, context)  # (B, L, D)
        (B, L, D), skips, last = h.shape, [], len(self.layers) - 1
        h = Made(h.reshape(B * L, D), None, None)
        for i, layers in enumerate(self.layers):
            skipped = net.skip == "concat" and i >= len(self.layers) // 2  # the next block reads e4m3 alone
            h = fp8_block.block(
                h,
                skips.pop() if layers.skip else None,
                layers,
                B,
                self.heads,
                wide=i == last or not skipped,
                narrow=i != last,
                by=self.by,
            )
            if i < len(self.layers) // 2:
                skips.append(h.narrow)
        return net.noise(h.wide.view(B, L, D), h.sums).to(x.dtype)


def _derived(index: int, block: Block, heads: int) -> fp8_block.Layers:
    skip, attention, proj, rest = block._layers()
    if not (attention and rest and (skip or block.skip_linear is None)):
        raise UserError(
            f"sample.precision=fp8: block {index} was changed (hooks, LoRA, ...), which the kernels would not call; expected bf16"
        )
    (norm1, qkv), (norm2, fc1, fc2) = attention, rest
    assert isinstance(norm1, Norm) and isinstance(qkv, Linear)
    return fp8_block.derive(norm1, qkv, proj, norm2, fc1, fc2, skip, heads)
