"""The decoder of an AutoencoderKL ("High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752),
read from the files that diffusers writes, bit for bit as diffusers' own.

Importing diffusers takes longer than everything else before a process's first image; to decode, this is enough.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.model.weights import load_weights, read_weights
from uvit_fast.runtime.errors import UserError

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
SHAPE = {  # what shapes the decoder, with diffusers' defaults
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
OTHERS = {  # about the encoder, for other users, or read by `autoencoders`
    *("in_channels", "down_block_types", "sample_size", "force_upcast", "use_quant_conv"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
}


class KLDecoder(nn.Module):
    """Latents (B, C, h, w) -> pixels (B, 3, 2^n h, 2^n w) in about [-1, 1], for n + 1 levels of channels.

    Attributes:
        config: the autoencoder's.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = {"scaling_factor": 0.18215} | config
        shape = {name: config.get(name, default) for name, default in SHAPE.items()}
        latent = shape["latent_channels"]
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if shape["use_post_quant_conv"] else nn.Identity()
        self.decoder = _Decoder(**{k: v for k, v in shape.items() if k != "use_post_quant_conv"})

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class _Decoder(nn.Module):
    def __init__(
        self,
        out_channels: int,
        block_out_channels: list[int],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        levels, groups = [*reversed(block_out_channels)], norm_num_groups  # from the smallest images to the largest
        self.conv_in = nn.Conv2d(latent_channels, levels[0], 3, padding=1)
        self.mid_block = _Middle(levels[0], groups, mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            _Level(before, channels, layers_per_block + 1, groups, is_last=i == len(levels) - 1)
            for i, (before, channels) in enumerate(zip([levels[0], *levels], levels))
        )
        self.conv_norm_out = nn.GroupNorm(groups, levels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(levels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attends: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_ResNet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, groups)] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class _Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, resnets: int, groups: int, is_last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_ResNet(outputs if i else inputs, outputs, groups) for i in range(resnets))
        self.upsamplers = nn.ModuleList([] if is_last else [_Upsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class _ResNet(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)  # (B, h w, C)
        q, k, v = (linear(tokens)[:, None] for linear in (self.to_q, self.to_k, self.to_v))  # (B, 1, h w, C)
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])  # (B, h w, C)
        return out.transpose(1, 2).reshape(x.shape) + x


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2 h, 2 w)


def find(name: str) -> tuple[dict[str, Any], Path] | None:
    """Return the config and the weight file of an AutoencoderKL that `KLDecoder` can decode and that is on this
    machine; None: diffusers may know more.

    Args:
        name: a local folder, also a pipeline's, or owner/repository[/subfolder] on the hub.
    """
    files = _in_a_folder(Path(name)) if Path(name).is_dir() else _in_the_hubs_cache(name)
    if not all(file.is_file() for file in files):
        return None
    try:
        config = json.loads(files[0].read_text("utf-8"))
        if not _is_known(config):
            return None
        with torch.device("meta"):
            KLDecoder(config)
    except (OSError, ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError):
        return None  # a file of any content: diffusers says what is wrong with it
    return config, files[1]


def _in_a_folder(folder: Path) -> list[Path]:
    return [(folder / "vae" if (folder / "vae").is_dir() else folder) / file for file in FILES]


def _in_the_hubs_cache(name: str) -> list[Path]:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return [Path()]
    parts = [part for part in name.split("/") if part]
    repository, subfolder = "/".join(parts[:2]), parts[2:]
    try:
        found = [try_to_load_from_cache(repository, "/".join([*subfolder, file])) for file in FILES]
    except ValueError:  # no name of a repository
        return [Path()]
    return [Path(path) if isinstance(path, str) else Path() for path in found]


def _is_known(config: dict[str, Any]) -> bool:
    """Return whether all that the config says of the decoder is what `KLDecoder` has."""
    said = {key: value for key, value in config.items() if not key.startswith("_")}
    blocks, act = said.pop("up_block_types", ["UpDecoderBlock2D"]), said.pop("act_fn", "silu")
    levels = said.get("block_out_channels", SHAPE["block_out_channels"])
    kind = config.get("_class_name") == "AutoencoderKL" and act in ("silu", "swish")
    return kind and [*blocks] == ["UpDecoderBlock2D"] * len(levels) and said.keys() <= {*SHAPE, *OTHERS}


def read(file: Path) -> dict[str, Tensor] | None:
    """Return all weights of an autoencoder by today's names: the oldest files have others for attention's. None if the
    file cannot be read: diffusers says why.
    """
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    try:
        weights = read_weights(file)
    except UserError:
        return None
    return {pattern.sub(lambda m: today[m[1]], key): value for key, value in weights.items()}


def load(
    config: dict[str, Any], state: dict[str, Tensor], source: str, device: torch.device, dtype: torch.dtype
) -> KLDecoder:
    """Return the decoder, frozen, with its part of an autoencoder's weights.

    Raises:
        UserError: weights that are missing or have other shapes.
    """
    with torch.device("meta"):
        net = KLDecoder(config).to(dtype)
    own = {key: value for key, value in state.items() if key.startswith(("decoder.", "post_quant_conv."))}
    return load_weights(net, own, source, device).eval().requires_grad_(False)
