"""The autoencoders of whole-model benchmarks, with random weights."""

from typing import Any

import torch


def kl(device: torch.device, channels: tuple[int, ...] = (128, 256, 512, 512)) -> Any:
    """Return Stable Diffusion's KL-f8 with random weights, bf16."""
    from diffusers import AutoencoderKL

    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=2,
        )
    return vae.to(torch.bfloat16).eval().requires_grad_(False)


def dc(device: torch.device, channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)) -> Any:
    """Return DC-AE's f32c32 for ImageNet (dc-ae-f32c32-in-1.0) with random weights, bf16."""
    from diffusers import AutoencoderDC

    blocks, multiscales = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, ((),) * 6
    with torch.device(device):
        vae = AutoencoderDC(
            encoder_block_types=blocks, encoder_block_out_channels=channels,
            decoder_block_types=blocks, decoder_block_out_channels=channels,
            encoder_layers_per_block=(0, 4, 8, 2, 2, 2), decoder_layers_per_block=(0, 5, 10, 2, 2, 2),
            encoder_qkv_multiscales=multiscales, decoder_qkv_multiscales=multiscales,
            decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3, decoder_act_fns=("relu",) * 3 + ("silu",) * 3,
        )  # fmt: skip
    return vae.to(torch.bfloat16).eval().requires_grad_(False)
