"""Diffusers' schedulers: ours, which is the published samplers, and how those of diffusers run in its place.

A diffusers scheduler counts the model's 1000 noise levels from 0 to 999, and the network is told the time at which its own schedule has
that level: n + 1 under SD, under VP what the continuous schedule has there.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from uvit_fast.build import SAMPLERS, SCHEDULES
from uvit_fast.diffusion.guidance import EpsFn, evaluate
from uvit_fast.diffusion.samplers import SPACINGS, Sampler

_COMMON = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
LEVELS: dict[str, dict[str, Any]] = {  # the schedules' noise levels in diffusers' terms
    "sd": {**_COMMON, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "vp": {**_COMMON, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
}
SAMPLING = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing", "skip_prk_steps": True}
OTHERS = [
    each.name for each in KarrasDiffusionSchedulers if each.name != "EDMEulerScheduler"
]  # of x_t = alpha x + sigma eps


class UViTScheduler(SchedulerMixin, ConfigMixin):
    """A noise schedule and the sampler that goes with it, by the names of the YAML configs.

    Its config has the schedule in diffusers' terms too: `DDIMScheduler.from_config(pipe.scheduler.config)` fits the model.
    """

    config_name = "scheduler_config.json"
    _compatibles = OTHERS

    @register_to_config
    def __init__(self, schedule: str = "sd", sampler: str = "dpmpp_fast", steps: int = 50, spacing: str | None = None):
        for value, names in ((schedule, SCHEDULES), (sampler, SAMPLERS), (spacing, (None, *SPACINGS))):
            if value not in names:
                raise ValueError(f"UViTScheduler: expected one of {', '.join(map(str, names))}, got {value!r}")
        self.register_to_config(**LEVELS[schedule], **SAMPLING)

    def sampler(self, steps: int | None = None) -> Sampler:
        """The sampler for `steps` network evaluations; default: those that the model was published with."""
        schedule = SCHEDULES[self.config.schedule]()
        return SAMPLERS[self.config.sampler](schedule, steps or self.config.steps, self.config.spacing)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "UViTScheduler: the pipeline runs its sampler as a whole; for a loop of your own take "
            "DDIMScheduler.from_config(pipe.scheduler.config), or pipe.scheduler.sampler(steps)(eps_fn, x_T)"
        )

    step = set_timesteps


def _of_others(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    ours = (f"'{name}': " in text for name in ("schedule", "sampler", "steps", "spacing"))
    return not (text.startswith("The config attributes") and any(ours))


logging.getLogger("diffusers.configuration_utils").addFilter(
    _of_others
)  # that they keep, but do not read, ours is as it should be


def check(scheduler: Any, schedule: str, latent: bool) -> None:
    """Refuse a scheduler of diffusers whose formulas or noise levels are not those of a model of `schedule`.

    Args:
        latent: the model makes latents, which are not within [-1, 1].

    Raises:
        ValueError: with what would fit.
    """
    kind = type(scheduler).__name__
    if kind not in OTHERS:
        raise ValueError(
            f"scheduler: {kind} solves another process than the model's; expected UViTScheduler, {', '.join(OTHERS)}"
        )
    wanted = {**LEVELS[schedule], **({"clip_sample": False, "thresholding": False} if latent else {})}
    for key, value in wanted.items():
        if scheduler.config.get(key, value) != value:
            raise ValueError(
                f"scheduler: {kind} with {key} {scheduler.config[key]}, where the model has {value}; "
                f"expected {kind}.from_config(UViTScheduler({schedule!r}).config)"
            )


def solve(
    scheduler: Any,
    schedule: str,
    steps: int,
    eps_fn: EpsFn,
    x_T: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    eta: float = 0.0,
    change: Callable[[int, Tensor, Tensor], Tensor] = lambda i, t, x: x,
) -> Tensor:
    """Sample with a scheduler of diffusers.

    Args:
        scheduler: as `check` lets it pass.
        steps: as its `set_timesteps` counts them.
        eps_fn: as the samplers take it.
        x_T: (B, C, H, W) ~ N(0, I).
        eta: DDIM's, between 0 and DDPM's noise at 1.
        change: change(i, t, x) -> the state that takes the place of x, after step i at the scheduler's time t.

    Returns:
        (B, C, H, W) fp32.

    Raises:
        ValueError: eta of a scheduler that has none.
    """
    takes = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in takes:
        raise ValueError(f"eta: {type(scheduler).__name__} takes none; expected 0, got {eta}")
    extra = {"generator": generator} if "generator" in takes else {}
    extra |= {"eta": eta} if eta else {}
    ours = SCHEDULES[schedule]()
    alphas = scheduler.alphas_cumprod.double().cpu().numpy()  # (1000,), their squares in our terms
    levels = ours.time_of_lambda(0.5 * np.log(alphas / (1 - alphas)))  # (1000,) times in [0, 1]
    scheduler.set_timesteps(steps, device=x_T.device)
    x = x_T.float() * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        level = float(np.interp(float(t), np.arange(len(levels)), levels).clip(ours.t_min, ours.t_max))
        time = x.new_full((len(x),), float(ours.network_time(level)))
        eps, scale = evaluate(eps_fn, scheduler.scale_model_input(x, t), time, level)
        if scale is not None:
            conditional, unconditional = eps.float().chunk(2)
            eps = conditional + scale * (conditional - unconditional)
        x = change(i, t, scheduler.step(eps.float(), t, x, **extra, return_dict=False)[0])
    return x
