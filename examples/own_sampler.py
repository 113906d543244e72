"""A sampler of your own: `python examples/own_sampler.py runs/digits`, after `make demo`.

A sampler is a list of stages. Each evaluates the network at a time t and forms the next state as a linear combination
whose coefficients are numbers before the loop starts. So it runs in captured graphs and on the fused update like the
built-in ones, with guidance, and with every prediction (eps, v, x_0, velocity).
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from uvit_fast import build_schedule, load_config
from uvit_fast.diffusion.predictions import NOISE
from uvit_fast.diffusion.schedules import Schedule
from uvit_fast.diffusion.stages import Stage, Staged
from uvit_fast.sampling import load_for_sampling
from uvit_fast.sampling.images import save_grid, to_uint8


class DDIM(Staged):
    """Song et al. 2021, "Denoising Diffusion Implicit Models", Equations 12 and 16.

    x_s = alpha_s / alpha_t (x_t - sigma_t eps) + sqrt(sigma_s^2 - c^2) eps + c z, where eta scales c: 0 is
    deterministic, 1 is DDPM's noise.
    """

    def __init__(self, schedule: Schedule, steps: int, eta: float = 0.0):
        self.eta = eta
        super().__init__(schedule, steps)

    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        times = schedule.grid(steps, spacing or schedule.spacing)  # from noise to data
        stages = []
        for t, s in zip(times[:-1], times[1:]):
            alpha, sigma = schedule.alpha(np.array([t, s])), schedule.sigma(np.array([t, s]))
            carry = alpha[1] / alpha[0]
            c = self.eta * sigma[1] / sigma[0] * np.sqrt(1 - carry**-2) if s > times[-1] else 0.0
            on_eps = np.sqrt(sigma[1] ** 2 - c**2) - carry * sigma[0]
            stages.append(self._stage(schedule, t, NOISE, start=carry, outputs=[on_eps], noise=c))
        return stages


@torch.no_grad()
def main(run: str, out: str, steps: int = 50) -> None:
    """Sample a hundred digits by DDIM with DDPM's noise."""
    cfg = load_config(Path(run) / "config.yaml")
    model = load_for_sampling(cfg, run, torch.device("cpu"))
    labels = torch.arange(10).repeat_interleave(10)  # (B,)
    sampler = DDIM(build_schedule(cfg), steps, eta=1.0)
    noise = torch.Generator().manual_seed(0)
    x_T = torch.randn(len(labels), *model.image, generator=noise)  # (B, C, H, W)
    save_grid(to_uint8(sampler(partial(model, y=labels), x_T, noise)), Path(out), columns=10)


if __name__ == "__main__":
    main(sys.argv[1], "ddim.png")
