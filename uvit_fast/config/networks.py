"""The section `model`: U-ViT, or one of the convolutional baselines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from uvit_fast.config.section import Section
from uvit_fast.runtime.text import shown


class NetworkConfig(Section):
    """What every network has: the shapes of image and condition."""

    img_size: int = Field(
        gt=0, le=2**14, description="Height and width of the network's input: pixels, or latent pixels."
    )
    in_chans: int = Field(gt=0, le=2**14, description="Channels of the input: 3 for RGB, 4 for KL-f8 latents.")
    num_classes: int = Field(
        0, ge=0, le=2**24, description="Rows of the label embedding, null label included; 0: no classes."
    )
    context_dim: int = Field(0, ge=0, le=2**16, description="Width of a text token (CLIP ViT-L/14: 768); 0: no text.")
    context_tokens: int = Field(77, gt=0, le=2**16, description="Text tokens per image, if context_dim > 0.")

    @model_validator(mode="after")
    def _one_condition(self) -> NetworkConfig:
        if self.num_classes and self.context_dim:
            raise ValueError("num_classes and context_dim cannot both be set: condition on classes or on text")
        return self


class ModelConfig(NetworkConfig):
    """U-ViT (paper, Section 3 and Table 1)."""

    patch_size: int = Field(gt=0, le=2**14, description="Side of a square patch, in (latent) pixels; divides img_size.")
    embed_dim: int = Field(gt=0, le=2**16, description="Width D of a token.")
    depth: int = Field(ge=2, le=1000, description="Depth of the paper; there are 2 * (depth // 2) + 1 blocks.")
    num_heads: int = Field(gt=0, le=2**16, description="Attention heads; divides embed_dim.")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="Hidden width of the MLP over D.")
    mlp_time_embed: bool = Field(False, description="Pass the sinusoidal time embedding through an MLP.")
    conv: bool = Field(True, description="One 3x3 convolution after unpatchify (paper, Section 3.1).")
    skip: Literal["concat", "add", "none"] = Field("concat", description="Long skip connections (paper, Figure 2a).")
    attention: Literal["auto", "fused", "flash_attn", "cudnn", "sdpa", "xformers", "math"] = Field(
        "auto", description="Attention backend; auto: the fastest one that can run."
    )
    kernels: Literal["auto", "fused", "reference"] = Field(
        "auto", description="Fused Triton kernels or plain PyTorch for the rest of a block; auto: fused where they run."
    )
    activation_checkpointing: Literal["none", "block", "selective"] = Field(
        "none",
        description="For the backward keep everything, each block's input, or also attention's output and fc1's.",
    )

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        return self


class UNetConfig(NetworkConfig):
    """A convolutional baseline (paper, Appendices C and F), if `unet` is set."""

    unet: Literal["ldm", "adm"] = Field(
        description="ldm: LDM's, conditioned on text. adm: ADM's, conditioned on classes or nothing."
    )
    channels: tuple[int, ...] = Field(
        max_length=15, description="Channels of each level, from full resolution down; multiples of 32."
    )
    layers: int = Field(gt=0, le=1000, description="Residual blocks per level.")
    attention: tuple[bool, ...] = Field(description="For each level: whether attention follows its residual blocks.")
    activation_checkpointing: Literal["none", "block"] = Field(
        "none", description="Keep everything for the backward, or recompute residual and attention blocks."
    )

    @model_validator(mode="after")
    def _fits(self) -> UNetConfig:
        if not self.channels or any(c % 32 or not 0 < c <= 2**16 for c in self.channels):
            raise ValueError(f"channels: expected multiples of 32, up to 65536, got {shown(self.channels)}")
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention: expected one of each of {len(self.channels)} levels, got {len(self.attention)}"
            )
        if self.img_size % 2 ** (len(self.channels) - 1):
            raise ValueError(f"img_size {self.img_size} must be a multiple of {2 ** (len(self.channels) - 1)}")
        if (self.unet == "ldm") != bool(self.context_dim):
            raise ValueError("unet: ldm needs context_dim, adm takes none")
        if self.unet == "adm" and any(has and c % 64 for c, has in zip(self.channels, self.attention)):
            raise ValueError("channels: adm's attention has heads of 64; expected multiples of 64 where there is some")
        return self


NETWORKS: dict[str, type[NetworkConfig]] = {"U-ViT": ModelConfig, "U-Net": UNetConfig}


def kind_of_network(model: Any) -> str:
    """Return the key in NETWORKS of a `model` section."""
    return "U-Net" if isinstance(model, UNetConfig) or (isinstance(model, dict) and "unet" in model) else "U-ViT"
