"""The models that whole-model benchmarks run, by provider: ours, and the published network in eager mode and compiled.

The peer keeps fp32 weights and runs the plain PyTorch ops under autocast, as the published code does, with PyTorch's own choice
of attention.
"""

import contextlib

import torch

from uvit_fast import build_model, load_config
from uvit_fast.config import Config

CONFIGS = {"S": "s2_cifar10", "M": "m4_64", "L": "l2_256", "H": "h2_256"}
LATENT = ["model.img_size=32", "model.patch_size=2", "model.in_chans=4", "model.num_classes=1001"]  # 258 tokens for all


def config(size: str, provider: str, checkpointing: str = "none") -> Config:
    """The config of S, M, L or H on 32 x 32 x 4 latents with 1001 classes."""
    ours = provider.startswith("ours")
    how = (
        ["model.kernels=auto", "model.attention=auto"] if ours else ["model.kernels=reference", "model.attention=sdpa"]
    )
    overrides = [*LATENT, *how, f"model.activation_checkpointing={checkpointing}", "data.name=synthetic"]
    return load_config(f"configs/{CONFIGS[size]}.yaml", overrides)


def model(cfg: Config, provider: str) -> torch.nn.Module:
    """A network on the GPU: bf16 weights for ours, fp32 weights for the peers."""
    dtype = torch.bfloat16 if provider.startswith("ours") else torch.float32
    with torch.device("cuda"):  # initialised there, which is minutes less for the large ones
        net = build_model(cfg).to(dtype)
    return torch.compile(net) if provider == "compiled" else net


def precision(provider: str) -> contextlib.AbstractContextManager:
    """Autocast for the peers; ours needs none."""
    return contextlib.nullcontext() if provider.startswith("ours") else torch.autocast("cuda", torch.bfloat16)


def images(cfg: Config, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random latents (B, C, H, W), network times (B,) and labels (B,)."""
    x = torch.randn(batch, cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size, device="cuda")
    return x, torch.rand(batch, device="cuda") * 999, torch.randint(1000, (batch,), device="cuda")
