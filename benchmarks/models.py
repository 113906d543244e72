"""The models that whole-model benchmarks run, by provider: ours, and the published network in eager mode and compiled.

The peer keeps fp32 weights and runs the plain PyTorch ops under autocast, as the published code does, with PyTorch's own choice
of attention.
"""

import contextlib
from collections.abc import Sequence

import torch

from uvit_fast import build_model, load_config
from uvit_fast.config import Config

CONFIGS = {"S": "s2_cifar10", "M": "m4_64", "L": "l2_256", "H": "h2_256"}
LATENT = ["model.img_size=32", "model.patch_size=2", "model.in_chans=4", "model.num_classes=1001"]  # 258 tokens for all


def config(size: str, provider: str, checkpointing: str = "none", overrides: Sequence[str] = ()) -> Config:
    """The config of S, M, L or H on 32 x 32 x 4 latents with 1001 classes, with `overrides` on top."""
    ours = provider.startswith("ours")
    how = (
        ["model.kernels=auto", "model.attention=auto"] if ours else ["model.kernels=reference", "model.attention=sdpa"]
    )
    settings = [*LATENT, *how, f"model.activation_checkpointing={checkpointing}", "data.name=synthetic"]
    return load_config(f"configs/{CONFIGS[size]}.yaml", [*settings, *overrides])


def model(cfg: Config, provider: str, device: torch.device | str = "cuda") -> torch.nn.Module:
    """A network on the device: bf16 weights for ours, fp32 weights for the peers."""
    dtype = torch.bfloat16 if provider.startswith("ours") else torch.float32
    with torch.device(device):  # initialised there, which is minutes less for the large ones
        net = build_model(cfg).to(dtype)
    return torch.compile(net) if provider == "compiled" else net


def precision(provider: str, device: torch.device | str = "cuda") -> contextlib.AbstractContextManager:
    """Autocast for the peers; ours needs none."""
    return (
        contextlib.nullcontext()
        if provider.startswith("ours")
        else torch.autocast(torch.device(device).type, torch.bfloat16)
    )


def images(
    cfg: Config, batch: int, device: torch.device | str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random latents (B, C, H, W), network times (B,) and labels (B,)."""
    x = torch.randn(batch, cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size, device=device)
    return x, torch.rand(batch, device=device) * 999, torch.randint(1000, (batch,), device=device)
