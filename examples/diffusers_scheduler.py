"""The network alone under a scheduler of diffusers:
`python examples/diffusers_scheduler.py imagenet256_uvit_huge.pth`.
"""

import sys

import torch
from diffusers import UniPCMultistepScheduler

from uvit_fast import load_config
from uvit_fast.config import Config
from uvit_fast.pipeline import UViTScheduler
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.sampling import load_for_sampling


@torch.no_grad()
def sample(cfg: Config, checkpoint: str, labels: list[int], steps: int = 20) -> torch.Tensor:
    """Return latents (B, 4, H, W), times the scale factor, from an SD-schedule model, which receives n = t + 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_for_sampling(cfg, checkpoint, device)
    scheduler = UniPCMultistepScheduler.from_config(UViTScheduler("sd").config)
    scheduler.set_timesteps(steps, device=device)
    y = torch.tensor(labels, device=device)  # (B,)
    x = torch.randn(len(y), model.in_chans, model.img_size, model.img_size, device=device)  # (B, C, H, W)
    for t in scheduler.timesteps:
        eps = model(x, (t + 1.0).expand(len(y)), y=y)
        x = scheduler.step(eps, t, x).prev_sample
    return x


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with in_one_line():
        latents = sample(load_config("h2_256"), sys.argv[1], labels=[207, 360])
        torch.save(latents, "latents.pt")
        print("wrote latents.pt")
