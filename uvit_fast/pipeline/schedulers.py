"""Diffusers' schedulers: ours, which holds the published samplers, and how diffusers' own run in its place.

A diffusers scheduler counts the model's 1000 noise levels from 0 to 999, and the network receives the time at which its
own schedule has that level: n + 1 for SD, for VP the continuous schedule's. For a flow the scheduler knows the time
itself, as sigma, and receives the velocity, whatever the network predicts.
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

from uvit_fast.build import PREDICTIONS, SAMPLERS, SCHEDULES
from uvit_fast.config import DiffusionConfig
from uvit_fast.diffusion.guidance import EpsFn, evaluate
from uvit_fast.diffusion.predictions import VELOCITY
from uvit_fast.diffusion.schedules import Schedule
from uvit_fast.diffusion.stages import SPACINGS, Sampler

_COMMON = {"num_train_timesteps": 1000, "trained_betas": None, "rescale_betas_zero_snr": False}
_FLOW = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
LEVELS: dict[str, dict[str, Any]] = {  # the schedules' noise levels in diffusers' terms
    "sd": {**_COMMON, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "vp": {**_COMMON, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "flow": _FLOW,
    "flow_sit": _FLOW,
}
TYPES = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
}  # predictions in diffusers' terms; a flow's is its velocity
SAMPLING = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing", "skip_prk_steps": True}
OTHERS = [
    each.name for each in KarrasDiffusionSchedulers if each.name != "EDMEulerScheduler"
]  # of x_t = alpha x + sigma eps
FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]  # for flows, with the next ones
FLOWS += ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]


def in_their_terms(schedule: str, prediction: str) -> dict[str, Any]:
    """Return a model's noise levels and prediction in the terms of diffusers' scheduler configs."""
    return {"prediction_type": TYPES.get(prediction), **LEVELS[schedule]}


def usual_prediction(schedule: str) -> str:
    """Return what a model predicts if nothing else is known."""
    return DiffusionConfig(schedule=schedule).prediction


class UViTScheduler(SchedulerMixin, ConfigMixin):
    """A noise schedule and its sampler, named as in the YAML configs.

    Its config also has schedule and prediction in diffusers' terms: `DDIMScheduler.from_config(pipe.scheduler.config)`
    fits the model, or, for a flow, `FlowMatchEulerDiscreteScheduler`.

    Args:
        prediction: what the network predicts; default: velocity for flows, else eps.
        shift: of a flow's times, see `sample.shift`.
    """

    config_name = "scheduler_config.json"
    _compatibles = [*OTHERS, *FLOWS[:2]]

    @register_to_config
    def __init__(
        self,
        schedule: str = "sd",
        sampler: str = "dpmpp_fast",
        steps: int = 50,
        spacing: str | None = None,
        prediction: str | None = None,
        shift: float = 1.0,
    ):
        for value, names in (
            *((schedule, SCHEDULES), (sampler, SAMPLERS)),
            *((spacing, (None, *SPACINGS)), (prediction, (None, *PREDICTIONS))),
        ):
            if value not in names:
                raise ValueError(f"UViTScheduler: expected one of {', '.join(map(str, names))}, got {value!r}")
        prediction = prediction or usual_prediction(schedule)
        self.register_to_config(
            **in_their_terms(schedule, prediction), **SAMPLING, prediction=prediction, flow_shift=shift
        )
        self.sampler(1)  # raises if the settings do not go together

    def sampler(self, steps: int | None = None) -> Sampler:
        """Return the sampler for `steps` network evaluations; default: those with which the model was published."""
        config, schedule = self.config, SCHEDULES[self.config.schedule]()
        prediction = PREDICTIONS[config.prediction](schedule)
        return SAMPLERS[config.sampler](schedule, steps or config.steps, config.spacing, prediction, config.shift)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "UViTScheduler: the pipeline runs its sampler as a whole; for a loop of your own take "
            "DDIMScheduler.from_config(pipe.scheduler.config), or pipe.scheduler.sampler(steps)(eps_fn, x_T)"
        )

    step = set_timesteps


def _of_others(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    ours = (f"'{name}': " in text for name in ("schedule", "sampler", "steps", "spacing", "prediction", "shift"))
    return not (text.startswith("The config attributes") and any(ours))


logging.getLogger("diffusers.configuration_utils").addFilter(
    _of_others
)  # diffusers' schedulers keep these keys without reading them; ours is right already


def check(scheduler: Any, schedule: str, latent: bool, prediction: str = "eps") -> None:
    """Refuse a scheduler of diffusers whose formulas or noise levels do not fit a model of `schedule`.

    Args:
        latent: whether the model samples latents, which are not within [-1, 1].
        prediction: what the model predicts.

    Raises:
        ValueError: the message says what would fit.
    """
    kind, flow = type(scheduler).__name__, LEVELS[schedule] is _FLOW
    if kind not in (fitting := FLOWS if flow else OTHERS):
        raise ValueError(
            f"scheduler: {kind} solves another process than the model's; expected UViTScheduler, {', '.join(fitting)}"
        )
    wanted = in_their_terms(schedule, prediction)
    wanted |= {"invert_sigmas": False, "use_dynamic_shifting": False} if flow else {}
    wanted |= {"clip_sample": False, "thresholding": False} if latent else {}
    for key, value in wanted.items():
        if scheduler.config.get(key, value) != value:
            ours = (
                f"{schedule!r}"
                if prediction == usual_prediction(schedule)
                else f"{schedule!r}, prediction={prediction!r}"
            )
            raise ValueError(
                f"scheduler: {kind} with {key} {scheduler.config[key]}, where the model has {value}; "
                f"expected {kind}.from_config(UViTScheduler({ours}).config)"
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
    prediction: str = "eps",
) -> Tensor:
    """Sample with a scheduler of diffusers.

    Args:
        scheduler: one that `check` accepts.
        steps: as its `set_timesteps` counts them.
        eps_fn: as for the samplers.
        x_T: (B, C, H, W) ~ N(0, I).
        eta: DDIM's, from 0 to 1, DDPM's noise.
        change: change(i, t, x) -> the state that replaces x after step i at the scheduler's time t.
        prediction: what eps_fn predicts.

    Returns:
        (B, C, H, W) fp32.

    Raises:
        ValueError: eta for a scheduler without it, or one that does not know the prediction.
    """
    takes = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in takes:
        raise ValueError(f"eta: {type(scheduler).__name__} takes none; expected 0, got {eta}")
    extra: dict[str, Any] = {"generator": generator} if "generator" in takes else {}
    extra |= {"eta": eta} if eta else {}
    ours, flow = SCHEDULES[schedule](), LEVELS[schedule] is _FLOW
    predicts = PREDICTIONS[prediction](ours)
    first = 1.0 if flow and predicts.determinant(0.0, 1.0) else ours.t_max
    levels = np.empty(0) if flow else _levels(scheduler, ours)
    scheduler.set_timesteps(steps, device=x_T.device)
    x = x_T.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        level = float(scheduler.sigmas[i]) if flow else float(np.interp(float(t), np.arange(len(levels)), levels))
        level = min(max(level, ours.t_min), first)
        time = x.new_full((len(x),), float(ours.network_time(level)))
        given = x if flow else scheduler.scale_model_input(x, t)
        output, scale = evaluate(eps_fn, given, time, level)
        if scale is not None:
            conditional, unconditional = output.float().chunk(2)
            output = conditional + scale * (conditional - unconditional)
        output = output.float()
        if flow:
            convert = predicts.convert(VELOCITY, ours.alpha(level), ours.sigma(level))
            output = convert[0] * x + convert[1] * output
        try:
            new = scheduler.step(output, t, x, **extra, return_dict=False)[0]
        except (NotImplementedError, ValueError) as error:
            if "prediction_type" not in str(error):
                raise
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} does not know prediction_type "
                f"{scheduler.config.prediction_type}, "
                "which the model has; expected UViTScheduler or DDIMScheduler"
            ) from None
        x = change(i, t, new)
    return x


def _levels(scheduler: Any, ours: Schedule) -> np.ndarray:
    """Return the times in [0, 1], (1000,), at which our schedule has their noise levels."""
    alphas = scheduler.alphas_cumprod.double().cpu().numpy()  # (1000,), their squares in our terms
    return ours.time_of_lambda(0.5 * np.log(alphas / (1 - alphas)))
