"""U-ViT (paper, Section 3 and Figure 1): a ViT whose tokens are the condition, the time and the noisy image's patches,
with long skip connections from shallow to deep blocks.

Shapes: B images, (C, H, W) each, L tokens = extras + patches, D = embed_dim, K = 3 for q, k and v. Parameters are named
as in the published checkpoints, whichever kernels run.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from uvit_fast.model import cached, ops
from uvit_fast.model.attention import attend
from uvit_fast.model.cached import Cache
from uvit_fast.model.inputs import check_inputs, labels_in_range
from uvit_fast.model.ops import Linear, Norm
from uvit_fast.model.recompute import recomputed
from uvit_fast.model.replayed import Replayed, replays
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.hooks import hooked, hooked_everywhere, plain_weights


class PatchEmbed(nn.Module):
    """Form the token sequence: the given tokens, then a linear map of each patch, row-major; add the positions.

    Reads its convolution's weights itself, or calls it: see `Block`.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, kernels: str):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.kernels = kernels

    def forward(self, x: Tensor, extras: list[Tensor], positions: Tensor) -> Tensor:
        """Map x (B, C, H, W), one or two extras (B, E, D), positions (1, L, D) to (B, L, D)."""
        weights = None if hooked_everywhere() else plain_weights(self.proj)
        if weights:
            weight, bias = weights
            return ops.assemble(x, weight, bias, extras, positions, kernels=self.kernels)
        patches = self.proj(x.to(positions.dtype)).flatten(2).transpose(1, 2)  # (B, N, D)
        return torch.cat([*extras, patches], dim=1) + positions


class Attention(nn.Module):
    """Multi-head self-attention; `Block` computes it fused with its neighbours."""

    def __init__(self, dim: int, num_heads: int, backend: str):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        return self.proj(self.mix(self.qkv(x)))

    def mix(self, qkv: Tensor) -> Tensor:
        """Attend: (B, L, 3D) -> (B, L, D)."""
        return attend(rearrange(qkv, "B L (K h d) -> B L K h d", K=3, h=self.num_heads), self.backend)


class Mlp(nn.Module):
    """The MLP; `Block` computes it fused with its neighbours."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block, after the long skip where there is one (paper, Figure 1 and Section 3.1).

    Reads its children's weights itself: under ZeRO-3 it must be a leaf, which the training engine sees to. Children
    that were changed (hooks, LoRA, quantised weights) are called instead, as are those fused with them.

    Attributes:
        checkpointing: what it keeps for the backward, see `model.recompute`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, concat_skip: bool, attention: str, kernels: str):
        super().__init__()
        self.kernels, self.checkpointing, self.hidden = kernels, "none", int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, self.hidden)
        self.skip_linear = nn.Linear(2 * dim, dim) if concat_skip else None

    def forward(
        self, x: Tensor, skip: Tensor | None = None, sums: Tensor | None = None, hand_on: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Map x and skip (B, L, D) to (B, L, D).

        Args:
            sums: of x, which the fused op that wrote x left for a LayerNorm (see `model.ops`).
            hand_on: return the result's sums too.
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            x, sums = self.compute(x, skip, sums)
        else:
            # Without the sums, which would be kept as its inputs are: 1/16 of x, to save one pass over it.
            x, sums = recomputed(self.compute, self.checkpointing, self.hidden, x, skip, None)
        return (x, sums) if hand_on else x

    def compute(self, x: Tensor, skip: Tensor | None, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
        skip_linear, norm1_qkv, proj, norm2_mlp = layers = self._layers()
        if whole := ops.block(x, skip, sums, layers, self.attn, kernels=self.kernels):
            return whole
        x, sums = self.joined(x, skip, sums, skip_linear)
        if norm1_qkv and norm2_mlp and self.skip_linear is not None and self.checkpointing == "none":
            # Both halves in one op, which keeps less for the backward; the skip's linear layer also keeps its inputs.
            a = self.attn.mix(ops.ln_linear(x, *norm1_qkv, sums, kernels=self.kernels))  # (B, L, D)
            return ops.proj_ln_mlp(a, proj, x, *norm2_mlp, kernels=self.kernels)
        x, sums = self.attended(x, sums, norm1_qkv, proj)
        return self.through_mlp(x, sums, norm2_mlp)

    # The block's three parts, (B, L, D) and sums -> (B, L, D) and sums, each with its weights from `_layers`.

    def joined(
        self, x: Tensor, skip: Tensor | None, sums: Tensor | None, skip_linear: Linear | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.skip_linear is not None:  # Linear(Concat(h_m, h_s))
            assert skip is not None
            if skip_linear:
                return ops.skip_linear(x, skip, skip_linear, kernels=self.kernels)
            return self.skip_linear(torch.cat([x, skip], dim=-1)), None
        return (x, sums) if skip is None else (x + skip, None)  # h_m + h_s, the ablation of Figure 2(a)

    def attended(
        self, x: Tensor, sums: Tensor | None, norm1_qkv: tuple[Norm, Linear] | None, proj: Linear | None
    ) -> tuple[Tensor, Tensor | None]:
        if not norm1_qkv:
            return x + self.attn(self.norm1(x)), None
        a = self.attn.mix(ops.ln_linear(x, *norm1_qkv, sums, kernels=self.kernels))  # (B, L, D)
        return ops.linear_residual(a, proj, x, kernels=self.kernels)  # x + proj(attention(norm1(x)))

    def through_mlp(
        self, x: Tensor, sums: Tensor | None, norm2_mlp: tuple[Norm, Linear, Linear] | None
    ) -> tuple[Tensor, Tensor | None]:
        if not norm2_mlp:
            return x + self.mlp(self.norm2(x)), None
        return ops.ln_mlp(x, *norm2_mlp, sums, kernels=self.kernels)  # x + fc2(gelu(fc1(norm2(x))))

    def _layers(
        self,
    ) -> tuple[Linear | None, tuple[Norm, Linear] | None, Linear | None, tuple[Norm, Linear, Linear] | None]:
        """Return the weights of the skip's linear layer, of (norm1, qkv), of proj, and of (norm2, fc1, fc2); None for
        those that were changed and must be called.
        """
        attn, mlp = self.attn, self.mlp
        skip = norm1 = qkv = proj = norm2 = fc1 = fc2 = None
        if not hooked_everywhere():
            skip = self.skip_linear and ops.layer(self.skip_linear)
            if type(attn) is Attention and not hooked(attn):
                norm1, qkv, proj = ops.layer(self.norm1), ops.layer(attn.qkv, bias=False), ops.layer(attn.proj)
            if type(mlp) is Mlp and not hooked(mlp):
                norm2, fc1, fc2 = ops.layer(self.norm2), ops.layer(mlp.fc1), ops.layer(mlp.fc2)
        attention = (norm1, qkv) if norm1 and qkv and proj else None
        rest = (norm2, fc1, fc2) if norm2 and fc1 and fc2 else None
        if self.kernels == "fused" and not (attention and rest and (skip or self.skip_linear is None)):
            raise UserError(
                "model.kernels=fused: a block was changed (hooks, LoRA, ...), which the fused ops would not call; "
                "expected auto"
            )
        return skip, attention, proj, rest


def _through(block: nn.Module, x: Tensor, skip: Tensor | None, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a block's result with its sums, (B, L, D), unless a hook or wrapper may change it."""
    if not isinstance(block, Block) or hooked(block) or hooked_everywhere():
        return block(x, skip), None
    return block(x, skip, sums, hand_on=True)


class UViT(Replayed):
    """The noise prediction network eps(x_t, t, c).

    Args:
        img_size, in_chans: height = width and channels of the input, in pixels or latent pixels.
        patch_size: side of a patch; divides img_size.
        embed_dim, depth, num_heads, mlp_ratio: D, the paper's depth (2 * (depth // 2) + 1 blocks), heads, MLP width/D.
        mlp_time_embed: pass the time token through Linear, SiLU, Linear.
        num_classes: rows of the label embedding, null label included; 0 without classes.
        context_dim, context_tokens: width and number of text tokens; context_dim 0 without text.
        conv: apply a 3x3 convolution to the output image.
        skip: "concat" (the paper's), "add" or "none" (Figure 2a).
        attention, kernels: backends, see `model.attention` and `model.ops`.
        activation_checkpointing: what each block keeps for the backward, see `model.recompute`.
    """

    block_class = Block  # a backward may be cut between blocks
    fused_classes = [Block, PatchEmbed]  # a sharding engine must gather each as one unit
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
        self.image, self.text = (in_chans, img_size, img_size), (context_tokens, context_dim) if context_dim else None
        self.skip, self.kernels, self.depth, self.num_heads, self.mlp_ratio = skip, kernels, depth, num_heads, mlp_ratio

        self.patch_embed = PatchEmbed(in_chans, D, patch_size, kernels)
        self.time_embed = (
            nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D)) if mlp_time_embed else nn.Identity()
        )
        self.label_emb = nn.Embedding(num_classes, D) if num_classes else None
        self.context_embed = nn.Linear(context_dim, D) if context_dim else None
        self.extras = 1 + bool(num_classes) + (context_tokens if context_dim else 0)  # tokens that are not patches
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
        """All blocks, in execution order."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) for Linears and pos_embed, zero biases; PyTorch's default for all others."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @replays
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Predict the noise. Without gradients, the second call of a shape is captured and later ones replay it
        (`model.replayed`).

        Args:
            x: (B, C, H, W), the noisy images or latents.
            t: (B,), the time as the network receives it: 999 t (VP) or n (SD); fp32 or an integer dtype.
            y: (B,) labels in [0, num_classes), int64 or int32, for class-conditional models only. On a GPU their values
                are not checked, since the host would have to wait: a label out of range ends in a device-side
                assertion.
            context: (B, context_tokens, context_dim) text features, for text-conditional models only.
            cache: outputs of earlier evaluations that replace some sublayers (`model.cached`); such a call is not
                captured.

        Returns:
            (B, C, H, W), eps, in x's dtype.

        Raises:
            ValueError: a shape, dtype or device that does not fit; a condition that is missing or that the model does
                not take; on a CPU, a label out of range; torch.jit.trace (use torch.export).
        """
        h = self.tokens(x, t, y, context)  # (B, L, D)
        skips, sums = [], None
        through = _through if cache is None else cached.through(self, cache)
        for block in self.in_blocks:
            h, sums = through(block, h, None, sums)
            skips.append(h)
        h, sums = through(self.mid_block, h, None, sums)
        for block in self.out_blocks:  # last in, first out
            h, sums = through(block, h, skips.pop() if self.skip != "none" else None, sums)
        return self.noise(h, sums, x.dtype)

    def tokens(self, x: Tensor, t: Tensor, y: Tensor | None, context: Tensor | None) -> Tensor:
        """Check the arguments of `forward` and return the tokens that enter the first block, (B, L, D)."""
        check_inputs(x, t, y, context, self.image, self.num_classes, self.text)
        dtype = self.pos_embed.dtype
        time = ops.timestep_embedding(t, self.embed_dim, dtype, kernels=self.kernels)  # (B, D)
        extras = [self.time_embed(time).unsqueeze(1)]  # (B, 1, D)
        if self.label_emb is not None:
            with labels_in_range(y, self.num_classes):
                extras = [self.label_emb(y).unsqueeze(1), *extras]  # (B, 1, D) each
        elif self.context_embed is not None and context is not None:
            extras = [*extras, self.context_embed(context.to(dtype))]  # (B, 1, D), (B, context_tokens, D)
        return self.patch_embed(x, extras, self.pos_embed)  # (B, L, D)

    def noise(self, h: Tensor, sums: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return eps (B, C, H, W) in `dtype` from the last block's output (B, L, D) and its sums."""
        # With gradients it calls them: ZeRO-3 gathers a module's weights where the module is called.
        norm, decoder, conv = self.norm, self.decoder_pred, self.final_layer
        plain = not torch.is_grad_enabled() and not hooked_everywhere()
        last = (ops.layer(norm), ops.layer(decoder)) if plain else None
        if last and last[0] and last[1]:
            h = ops.ln_linear(h, last[0], last[1], sums, kernels=self.kernels)  # (B, L, p*p*C)
        else:
            h = decoder(norm(h))
        h = h[:, self.extras :]  # (B, N, p*p*C); cut here, where tokens are narrow
        weights = ops.conv3x3(conv) if plain and conv is not None else None
        if conv is None or weights:
            return ops.unpatchify(h, self.patch_size, weights, dtype, kernels=self.kernels)  # (B, C, H, W)
        return conv(ops.unpatchify(h, self.patch_size, None, h.dtype)).to(dtype)
