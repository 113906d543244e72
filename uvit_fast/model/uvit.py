"""U-ViT (paper, Section 3 and Figure 1): a ViT whose tokens are the condition, the time and the noisy image's patches,
with long skip connections from shallow to deep blocks.

Shapes: B images, (C, H, W) each, L tokens = extras + patches, D = embed_dim, K = 3 for q, k and v. Names of the parameters
are those of the published checkpoints, whichever kernels run.
"""

import math

import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor

from uvit_fast.model import ops
from uvit_fast.model.attention import attend
from uvit_fast.model.recompute import recomputed


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding, cos first (paper, Appendix; as in DDPM).

    Args:
        t: (B,) what the network receives as time: 999 t (VP) or n (SD); may be fractional.
        dim: even.

    Returns:
        (B, dim), fp32.
    """
    half = dim // 2
    freqs = torch.exp(
        -math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )  # (dim/2,)
    angles = t.float()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


class PatchEmbed(nn.Module):
    """All tokens: those that are given, then a linear map of each patch of the image, row-major; positions are added.

    It reads its convolution's weights itself: see `Block`.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, kernels: str):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.kernels = kernels

    def forward(self, x: Tensor, extras: Tensor, positions: Tensor) -> Tensor:
        """x (B, C, H, W), extras (B, E, D), positions (1, L, D) -> (B, L, D)."""
        return ops.assemble(x, self.proj.weight, self.proj.bias, extras, positions, kernels=self.kernels)


class Attention(nn.Module):
    """The weights of multi-head self-attention; `Block.forward` uses them, fused with their neighbours."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """The weights of the MLP; `Block.forward` uses them, fused with their neighbours."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """A pre-norm transformer block, after the long skip where there is one (paper, Figure 1 and Section 3.1).

    It reads its children's weights itself: under ZeRO-3 it must be a leaf, which the training engine sees to.

    Attributes:
        checkpointing: what it keeps for the backward, as in `model.recompute`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, concat_skip: bool, attention: str, kernels: str):
        super().__init__()
        self.num_heads, self.attention, self.kernels, self.checkpointing = num_heads, attention, kernels, "none"
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if concat_skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, skip)
        return recomputed(self.compute, self.checkpointing, self.mlp.fc1.out_features, x, skip)

    def compute(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """x and skip (B, L, D) -> (B, L, D)."""
        norm1, attn, norm2, mlp, how = self.norm1, self.attn, self.norm2, self.mlp, self.kernels
        if self.skip_linear is not None:  # Linear(Concat(h_m, h_s))
            x = ops.skip_linear(x, skip, self.skip_linear.weight, self.skip_linear.bias, kernels=how)  # (B, L, D)
        elif skip is not None:  # h_m + h_s, the ablation of Figure 2(a)
            x = x + skip
        qkv = ops.ln_linear(x, norm1.weight, norm1.bias, attn.qkv.weight, attn.qkv.bias, kernels=how)  # (B, L, 3D)
        qkv = rearrange(qkv, "B L (K h d) -> B L K h d", K=3, h=self.num_heads)
        a = attend(qkv, self.attention)  # (B, L, D)
        proj = (attn.proj.weight, attn.proj.bias)
        mlp_weights = (norm2.weight, norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        if self.skip_linear is None or self.checkpointing != "none":
            x = ops.linear_residual(a, *proj, x, kernels=how)  # x + proj(attention(norm1(x)))
            return ops.ln_mlp(x, *mlp_weights, kernels=how)  # x + fc2(gelu(fc1(norm2(x))))
        # The same two in one op, which keeps less for the backward: here the skip's linear layer keeps its inputs too.
        return ops.proj_ln_mlp(a, *proj, x, *mlp_weights, kernels=how)


class UViT(nn.Module):
    """The noise prediction network eps(x_t, t, c).

    Args:
        img_size, in_chans: height = width and channels of the input, pixels or latent pixels.
        patch_size: side of a patch; divides img_size.
        embed_dim, depth, num_heads, mlp_ratio: D, the paper's depth (2 * (depth // 2) + 1 blocks), heads, MLP width over D.
        mlp_time_embed: Linear, SiLU, Linear on the time token.
        num_classes: rows of the label embedding, null label included; 0 without classes.
        context_dim, context_tokens: width and number of text tokens; context_dim 0 without text.
        conv: one 3x3 convolution on the output image.
        skip: "concat" (the paper's), "add" or "none" (Figure 2a).
        attention, kernels: backends, see `model.attention` and `model.ops`.
        activation_checkpointing: what every block keeps for the backward, see `model.recompute`.
    """

    block_class = Block  # a backward may be cut between these
    fused_classes = [Block, PatchEmbed]  # each is what a sharding engine must gather as one unit
    fixed_weights = staticmethod(ops.fixed_weights)  # for loops over `forward` that change no weight

    def __init__(
        self,
        img_size: int,
        in_chans: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        mlp_time_embed: bool = False,
        num_classes: int = 0,
        context_dim: int = 0,
        context_tokens: int = 77,
        conv: bool = True,
        skip: str = "concat",
        attention: str = "auto",
        kernels: str = "auto",
        activation_checkpointing: str = "none",
    ):
        super().__init__()
        D = embed_dim
        self.img_size, self.in_chans, self.patch_size, self.embed_dim = img_size, in_chans, patch_size, D
        self.num_classes, self.context_dim, self.context_tokens = num_classes, context_dim, context_tokens
        self.skip, self.kernels = skip, kernels

        self.patch_embed = PatchEmbed(in_chans, D, patch_size, kernels)
        self.time_embed = (
            nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D)) if mlp_time_embed else nn.Identity()
        )
        self.label_emb = nn.Embedding(num_classes, D) if num_classes else None
        self.context_embed = nn.Linear(context_dim, D) if context_dim else None
        self.extras = 1 + bool(num_classes) + (context_tokens if context_dim else 0)  # tokens that are no patches
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (img_size // patch_size) ** 2, D))

        def block(concat_skip: bool = False) -> Block:
            return Block(D, num_heads, mlp_ratio, concat_skip, attention, kernels)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(concat_skip=skip == "concat") for _ in range(depth // 2))
        for each in self.blocks:
            each.checkpointing = activation_checkpointing

        self.norm = nn.LayerNorm(D)
        self.decoder_pred = nn.Linear(D, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, kernel_size=3, padding=1) if conv else None
        self.reset_parameters()

    @property
    def blocks(self) -> list[Block]:
        """In the order in which they run."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02 on Linears and pos_embed, zero biases; convolutions and labels keep PyTorch's default."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            x: (B, C, H, W), the noisy images or latents.
            t: (B,), what the network receives as time: 999 t (VP) or n (SD); fp32 or an integer type.
            y: (B,) labels in [0, num_classes), for class-conditional models only.
            context: (B, context_tokens, context_dim) text features, for text-conditional models only.

        Returns:
            (B, C, H, W), eps, in x's dtype.

        Raises:
            ValueError: a shape that does not fit the model, a missing condition, or one that the model does not take.
        """
        self._check(x, t, y, context)
        dtype = self.pos_embed.dtype
        time = self.time_embed(timestep_embedding(t, self.embed_dim).to(dtype)).unsqueeze(1)  # (B, 1, D)
        if self.label_emb is not None:
            extras = torch.cat([self.label_emb(y).unsqueeze(1), time], dim=1)  # (B, E, D)
        elif self.context_embed is not None:
            extras = torch.cat([time, self.context_embed(context.to(dtype))], dim=1)
        else:
            extras = time
        h = self.patch_embed(x.to(dtype), extras, self.pos_embed)  # (B, L, D)

        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:  # last in, first out
            h = block(h, skips.pop() if self.skip != "none" else None)

        norm, decoder = self.norm, self.decoder_pred
        if torch.is_grad_enabled():  # ZeRO-3 gathers the weights of a module where it is called
            h = decoder(norm(h))  # (B, L, p*p*C)
        else:
            h = ops.ln_linear(h, norm.weight, norm.bias, decoder.weight, decoder.bias, kernels=self.kernels)
        h = h[:, self.extras :]  # (B, N, p*p*C); cut here, where a token is narrow
        p, side = self.patch_size, self.img_size // self.patch_size
        eps = rearrange(h, "B (h w) (p1 p2 C) -> B C (h p1) (w p2)", h=side, p1=p, p2=p)  # (B, C, H, W)
        if self.final_layer is not None:
            eps = self.final_layer(eps)
        return eps.to(x.dtype)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None, context: Tensor | None) -> None:
        B = x.shape[0]
        image = (B, self.in_chans, self.img_size, self.img_size)
        if x.shape != image:
            raise ValueError(f"x: expected shape {image}, got {tuple(x.shape)}")
        if t.shape != (B,):
            raise ValueError(f"t: expected shape {(B,)}, got {tuple(t.shape)}")
        if (y is None) != (self.label_emb is None) or (y is not None and y.shape != (B,)):
            wanted = "no labels: the model has no classes" if self.label_emb is None else f"labels of shape {(B,)}"
            raise ValueError(f"y: expected {wanted}, got {'none' if y is None else tuple(y.shape)}")
        text = (B, self.context_tokens, self.context_dim)
        if (context is None) != (self.context_embed is None) or (context is not None and context.shape != text):
            wanted = "no text: the model takes none" if self.context_embed is None else f"text features of shape {text}"
            raise ValueError(f"context: expected {wanted}, got {'none' if context is None else tuple(context.shape)}")
