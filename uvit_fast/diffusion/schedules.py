"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, with alpha_t^2 + sigma_t^2 = 1 (paper, Section 2) or, for flows,
alpha_t + sigma_t = 1.

Time t runs from 0 (data) to 1 (noise); lambda_t = log(alpha_t / sigma_t) is half the log signal-to-noise ratio. What a
solver needs is float64 NumPy, because it is computed before the loop; what a training step needs stays on the device.
"""

import math
from abc import abstractmethod
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

Level = Any  # a number or a float64 array; a tensor where training draws times
Times = TypeVar("Times", np.ndarray, Tensor)


class Schedule(Protocol):
    """What solvers and training need of a schedule; `grid` and `add_noise` are inherited."""

    t_max: float = 1.0  # where sampling starts
    t_min: float  # where sampling ends
    t_end: float | None = None  # on grids uniform in time, the end for solvers that can reach it
    spacing: str  # "logsnr" or "time": the grid of the published samplers
    published_steps: float = 50  # with at least this many evaluations, solvers keep the published samplers' orders

    @abstractmethod
    def alpha(self, t: Level) -> Level: ...

    @abstractmethod
    def sigma(self, t: Level) -> Level: ...

    @abstractmethod
    def lambda_(self, t: Level) -> Level:
        """Return log(alpha_t / sigma_t), which falls from data to noise."""

    @abstractmethod
    def time_of_lambda(self, lam: Level) -> Level:
        """Invert `lambda_`."""

    def grid(self, intervals: int, spacing: str, to_data: bool = False) -> np.ndarray:
        """Return times from t_max to t_min, (intervals + 1,): uniform in "time", in "logsnr" (lambda), or, for
        "karras", in (sigma / alpha)^(1/7) (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
        Generative Models", Equation 5).

        Args:
            to_data: let a grid uniform in time end at `t_end`, where lambda is infinite.
        """
        if spacing == "time":
            last = self.t_end if to_data and self.t_end is not None else self.t_min
            return np.linspace(self.t_max, last, intervals + 1)
        ends = self.lambda_(np.array([self.t_max, self.t_min]))
        if spacing == "karras":
            first, last = np.exp(-ends / 7)
            return self.time_of_lambda(-7 * np.log(np.linspace(first, last, intervals + 1)))
        return self.time_of_lambda(np.linspace(ends[0], ends[1], intervals + 1))

    @abstractmethod
    def network_time(self, t: Level) -> Level:
        """Return the time as the network receives it."""

    @abstractmethod
    def levels(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, sigma and the network's time for a training step, each (B,) fp32 on u's device.

        Args:
            u: (B,) fp32 in [0, 1], the time; uniform unless training draws it from another distribution.
        """

    def add_noise(self, x_0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noisy input of a training step.

        Args:
            x_0, noise: (B, C, H, W) fp32. u: as in `levels`.

        Returns:
            x_t (B, C, H, W) and the network's time (B,), both fp32, on u's device.
        """
        alpha, sigma, time = self.levels(u)
        return mix(alpha, x_0, sigma, noise), time


class VariancePreserving(Schedule):
    """Schedules with alpha_t^2 + sigma_t^2 = 1; each defines `log_alpha`, its inverse, `network_time` and `levels`."""

    @abstractmethod
    def log_alpha(self, t: Level) -> Level: ...

    @abstractmethod
    def time_of_log_alpha(self, log_alpha: Level) -> Level: ...

    def alpha(self, t: Level) -> Level:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: Level) -> Level:
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def lambda_(self, t: Level) -> Level:
        return self.log_alpha(t) - np.log(self.sigma(t))

    def time_of_lambda(self, lam: Level) -> Level:
        return self.time_of_log_alpha(-0.5 * np.logaddexp(0.0, -2.0 * np.asarray(lam, np.float64)))


class VPSchedule(VariancePreserving):
    """Variance preserving, continuous: beta(t) = 0.1 + 19.9 t; the network receives 999 t."""

    beta_0, beta_1 = 0.1, 20.0
    t_min = 1e-4
    spacing = "logsnr"

    def beta(self, t: Level) -> Level:
        """Return the rate of the forward SDE dx = -beta x / 2 dt + sqrt(beta) dw."""
        return self.beta_0 + (self.beta_1 - self.beta_0) * t

    def log_alpha(self, t: Level) -> Level:
        return -0.25 * (self.beta_1 - self.beta_0) * t**2 - 0.5 * self.beta_0 * t

    def time_of_log_alpha(self, log_alpha: Level) -> Level:
        a, b, c = 0.25 * (self.beta_1 - self.beta_0), 0.5 * self.beta_0, -log_alpha  # a t^2 + b t = c
        return 2 * c / (b + np.sqrt(b**2 + 4 * a * c))  # the form of the root without cancellation

    def network_time(self, t: Level) -> Level:
        return 999 * t

    def levels(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_alpha = self.log_alpha(u)  # t = u
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt(), 999 * u


class SDSchedule(VariancePreserving):
    """Stable Diffusion's 1000 discrete steps, sqrt(beta) linear; the network receives n in training, 1000 t in
    sampling.
    """

    steps = 1000
    t_min = 1e-3
    spacing = "time"

    def __init__(self):
        betas = np.linspace(0.00085**0.5, 0.0120**0.5, self.steps, dtype=np.float64) ** 2
        self._log_alphas = 0.5 * np.cumsum(np.log1p(-betas))  # of n = 1 ... 1000
        self._times = np.arange(1, self.steps + 1) / self.steps
        self._tables: dict[torch.device, Tensor] = {}

    def log_alpha(self, t: Level) -> Level:
        """Interpolate linearly between the steps t = n / 1000."""
        return np.interp(t, self._times, self._log_alphas)

    def time_of_log_alpha(self, log_alpha: Level) -> Level:
        return np.interp(-log_alpha, -self._log_alphas, self._times)

    def network_time(self, t: Level) -> Level:
        return self.steps * t

    def levels(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take n = floor(1000 u) + 1, uniform in 1 ... 1000 if u is uniform."""
        n = (self.steps * u).long().clamp_(max=self.steps - 1)  # (B,), n - 1
        alpha, sigma = self._table(u.device)[:, n]  # (B,) each
        return alpha, sigma, (n + 1).float()

    def _table(self, device: torch.device) -> Tensor:
        """Return alpha and sigma of n = 1 ... 1000: (2, 1000) fp32."""
        if device not in self._tables:
            table = np.stack([np.exp(self._log_alphas), np.sqrt(-np.expm1(2 * self._log_alphas))])
            self._tables[device] = torch.from_numpy(table).float().to(device)
        return self._tables[device]


class FlowSchedule(Schedule):
    """The linear path x_t = (1 - t) x_0 + t eps of flow matching and rectified flow (Lipman et al. 2023; Liu et al.
    2023); the network receives 1000 t.

    lambda = log((1 - t) / t) is infinite at both ends. Solvers that need it start at t = 0.999, as in diffusers, and
    end at t = 0.001, or at 0 if their last step is of order 1 and so returns the predicted data.
    """

    t_max, t_min, t_end = 1 - 1e-3, 1e-3, 0.0
    spacing = "time"
    published_steps = math.inf

    def alpha(self, t: Level) -> Level:
        return 1.0 - t

    def sigma(self, t: Level) -> Level:
        return t

    def lambda_(self, t: Level) -> Level:
        with np.errstate(divide="ignore"):  # infinite at t = 0
            return np.log1p(-np.asarray(t, np.float64)) - np.log(t)

    def time_of_lambda(self, lam: Level) -> Level:
        return np.exp(-np.logaddexp(0.0, lam))

    def network_time(self, t: Level) -> Level:
        return 1000 * t

    def levels(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 1 - u, u, self.network_time(u)


class SiTFlowSchedule(FlowSchedule):
    """The same path for networks in SiT's convention (Ma et al. 2024), such as DC-AE's USiT: they receive 1 - t, 1 at
    the data.
    """

    def network_time(self, t: Level) -> Level:
        return 1 - t


def shifted(t: Times, shift: float) -> Times:
    """Return shift t / (1 + (shift - 1) t): above 1 it moves times in [0, 1] towards the noise (Esser et al. 2024,
    Section 5.3.2), in lambda by a constant.
    """
    return t if shift == 1 else shift * t / (shift * t + (1 - t))  # exact at both ends


def mix(alpha: Tensor, x_0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return alpha x_0 + sigma noise, (B, C, H, W); alpha, sigma: (B,)."""
    return alpha.view(-1, 1, 1, 1) * x_0 + sigma.view(-1, 1, 1, 1) * noise
