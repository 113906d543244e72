"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1 (paper, Section 2).

Time t runs from 0 (data) to 1 (noise); lambda_t = log(alpha_t / sigma_t) is half the log signal-to-noise ratio. What a solver needs is
float64 NumPy, because it is computed before the loop; what a training step needs stays on the device.
"""

import numpy as np
import torch
from torch import Tensor


class Schedule:
    """What all schedules share. A schedule defines `log_alpha`, its inverse, `network_time` and how training draws times."""

    t_max: float = 1.0  # where sampling starts
    t_min: float  # where sampling ends
    spacing: str  # "logsnr" or "time": the grid of the published samplers

    def log_alpha(self, t: np.ndarray) -> np.ndarray:
        raise TypeError("a schedule defines log_alpha")

    def _time_of_log_alpha(self, log_alpha: np.ndarray) -> np.ndarray:
        raise TypeError("a schedule defines the inverse of log_alpha")

    def alpha(self, t: np.ndarray) -> np.ndarray:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: np.ndarray) -> np.ndarray:
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def lambda_(self, t: np.ndarray) -> np.ndarray:
        """log(alpha_t / sigma_t), which falls from data to noise."""
        return self.log_alpha(t) - np.log(self.sigma(t))

    def time_of_lambda(self, lam: np.ndarray) -> np.ndarray:
        """The inverse of `lambda_`."""
        return self._time_of_log_alpha(-0.5 * np.logaddexp(0.0, -2.0 * np.asarray(lam, np.float64)))

    def grid(self, intervals: int, spacing: str) -> np.ndarray:
        """Times from t_max to t_min, (intervals + 1,): uniform in "time", in "logsnr" (lambda), or as in "karras", uniform in
        (sigma / alpha)^(1/7) (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", Equation 5).
        """
        if spacing == "time":
            return np.linspace(self.t_max, self.t_min, intervals + 1)
        ends = self.lambda_(np.array([self.t_max, self.t_min]))
        if spacing == "karras":
            return self.time_of_lambda(-7 * np.log(np.linspace(*np.exp(-ends / 7), intervals + 1)))
        return self.time_of_lambda(np.linspace(*ends, intervals + 1))


class VPSchedule(Schedule):
    """Variance preserving, continuous: beta(t) = 0.1 + 19.9 t; the network receives 999 t."""

    beta_0, beta_1 = 0.1, 20.0
    t_min = 1e-4
    spacing = "logsnr"

    def beta(self, t: np.ndarray) -> np.ndarray:
        """The rate of the forward SDE dx = -beta x / 2 dt + sqrt(beta) dw."""
        return self.beta_0 + (self.beta_1 - self.beta_0) * t

    def log_alpha(self, t: np.ndarray) -> np.ndarray:
        return -0.25 * (self.beta_1 - self.beta_0) * t**2 - 0.5 * self.beta_0 * t

    def _time_of_log_alpha(self, log_alpha: np.ndarray) -> np.ndarray:
        a, b, c = 0.25 * (self.beta_1 - self.beta_0), 0.5 * self.beta_0, -log_alpha  # a t^2 + b t = c
        return 2 * c / (b + np.sqrt(b**2 + 4 * a * c))  # the root's form without cancellation

    def network_time(self, t: np.ndarray) -> np.ndarray:
        return 999 * t

    def add_noise(self, x_0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Training's noisy input: t = u.

        Args:
            x_0, noise: (B, C, H, W) fp32. u: (B,) fp32, uniform in [0, 1).

        Returns:
            x_t (B, C, H, W) and the network's time (B,), both fp32, on u's device.
        """
        log_alpha = self.log_alpha(u)
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()  # (B,)
        return _mix(alpha, x_0, sigma, noise), 999 * u


class SDSchedule(Schedule):
    """Stable Diffusion's 1000 discrete steps: sqrt(beta) linear; the network receives n in training, 1000 t in sampling."""

    steps = 1000
    t_min = 1e-3
    spacing = "time"

    def __init__(self):
        betas = np.linspace(0.00085**0.5, 0.0120**0.5, self.steps, dtype=np.float64) ** 2
        self._log_alphas = 0.5 * np.cumsum(np.log1p(-betas))  # of n = 1 ... 1000
        self._times = np.arange(1, self.steps + 1) / self.steps
        self._tables: dict[torch.device, Tensor] = {}

    def log_alpha(self, t: np.ndarray) -> np.ndarray:
        """Linear between the steps t = n / 1000."""
        return np.interp(t, self._times, self._log_alphas)

    def _time_of_log_alpha(self, log_alpha: np.ndarray) -> np.ndarray:
        return np.interp(-log_alpha, -self._log_alphas, self._times)

    def network_time(self, t: np.ndarray) -> np.ndarray:
        return self.steps * t

    def add_noise(self, x_0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Training's noisy input: n = floor(1000 u) + 1, uniform in 1 ... 1000. Shapes as for VP."""
        n = (self.steps * u).long().clamp_(max=self.steps - 1)  # (B,), n - 1
        alpha, sigma = self._table(u.device)[:, n]  # (B,) each
        return _mix(alpha, x_0, sigma, noise), (n + 1).float()

    def _table(self, device: torch.device) -> Tensor:
        """(2, 1000) fp32: alpha and sigma of n = 1 ... 1000."""
        if device not in self._tables:
            table = np.stack([np.exp(self._log_alphas), np.sqrt(-np.expm1(2 * self._log_alphas))])
            self._tables[device] = torch.from_numpy(table).float().to(device)
        return self._tables[device]


def noise_loss(eps: Tensor, noise: Tensor) -> Tensor:
    """Mean over C, H, W, then over the batch, of (eps - noise)^2 in fp32 (paper, Equation 1)."""
    return (eps.float() - noise.float()).square().flatten(1).mean(dim=1).mean()


def _mix(alpha: Tensor, x_0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    return alpha.view(-1, 1, 1, 1) * x_0 + sigma.view(-1, 1, 1, 1) * noise
