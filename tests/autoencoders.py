"""Small autoencoders with random weights, on disk as users have them."""

from pathlib import Path
from typing import Any

import torch


def kl(**options: Any) -> Any:
    """Two levels, so pixels are 2 x 2; posteriors of 4 channels."""
    from diffusers import AutoencoderKL

    levels = {"block_out_channels": (8, 8), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return _seeded(AutoencoderKL, levels | blocks | options)


def dc(**options: Any) -> Any:
    """Three levels, so pixels are 4 x 4; latents of 8 channels; linear attention on the last level, as DC-AE has it."""
    from diffusers import AutoencoderDC

    settings: dict[str, Any] = {"latent_channels": 8, "attention_head_dim": 4}
    for part in ("encoder", "decoder"):
        settings[f"{part}_block_types"] = ("ResBlock", "ResBlock", "EfficientViTBlock")
        settings[f"{part}_block_out_channels"], settings[f"{part}_layers_per_block"] = (8, 8, 16), (1, 1, 1)
        settings[f"{part}_qkv_multiscales"] = ((), (), (5,))
    return _seeded(AutoencoderDC, settings | options)


def saved(vae: Any, folder: Path) -> str:
    """The folder's name."""
    vae.save_pretrained(folder)
    return str(folder)


def _seeded(make: Any, options: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(**options).eval().requires_grad_(False)
