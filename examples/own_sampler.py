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

from uvit_fast import build_objective, load_config
from uvit_fast.diffusion.predictions import NOISE, Prediction
from uvit_fast.diffusion.schedules import Schedule
from uvit_fast.diffusion.stages import Stage, Staged
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.sampling import load_for_sampling
from uvit_fast.sampling.images import save_grid, to_uint8


class DDIM(Staged):
    """Song et al. 2021, "Denoising Diffusion Implicit Models", Equations 12 and 16.

    x_s = alpha_s / alpha_t (x_t - sigma_t eps) + sqrt(sigma_s^2 - c^2) eps + c z, where eta scales c: 0 is
    deterministic, 1 is DDPM's noise, with c^2 = (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2).
    """

    def __init__(self, schedule: Schedule, steps: int, eta: float = 0.0, prediction: Prediction | None = None):
        self.eta = eta
        super().__init__(schedule, steps, prediction=prediction)

    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        times = schedule.grid(steps, spacing or schedule.spacing)  # from noise to data
        stages = []
        for t, s in zip(times[:-1], times[1:]):
            alpha, sigma = schedule.alpha(np.array([t, s])), schedule.sigma(np.array([t, s]))
            carry = alpha[1] / alpha[0]
            fresh = np.sqrt(sigma[0] ** 2 - (sigma[1] / carry) ** 2)  # of the noise at t, what was not there at s
            c = self.eta * sigma[1] / sigma[0] * fresh if s > times[-1] else 0.0
            on_eps = np.sqrt(sigma[1] ** 2 - c**2) - carry * sigma[0]
            stages.append(self._stage(schedule, t, NOISE, start=carry, outputs=[on_eps], noise=c))
        return stages


@torch.no_grad()
def main(run: str, out: str, steps: int = 50) -> None:
    """Sample a hundred digits by DDIM with DDPM's noise."""
    cfg = load_config(Path(run) / "config.yaml")
    model = load_for_sampling(cfg, run, "cpu")
    labels = torch.arange(10).repeat_interleave(10)  # (B,)
    learned = build_objective(cfg)  # the schedule that it was trained with, and what it predicts
    sampler = DDIM(learned.schedule, steps, eta=1.0, prediction=learned.prediction)
    noise = torch.Generator().manual_seed(0)
    x_T = torch.randn(len(labels), *model.image, generator=noise)  # (B, C, H, W)
    save_grid(to_uint8(sampler(partial(model, y=labels), x_T, noise)), Path(out), columns=10)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with in_one_line():
        main(sys.argv[1], "ddim.png")
        print("wrote ddim.png")
