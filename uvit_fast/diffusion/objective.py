"""The training objective: the distribution of times, the network's target, and the weight of each sample's loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uvit_fast.diffusion.predictions import Noise, Prediction
from uvit_fast.diffusion.schedules import Schedule, mix, shifted

TINY = 1e-6  # smaller levels count as this in the weights, which then have the right limits


class Task(NamedTuple):
    """A noisy batch and the network's target for it; the loss is mse_loss(output, target, weight)."""

    x_t: Tensor  # (B, C, H, W) fp32
    time: Tensor  # (B,) fp32, as the network receives it
    target: Tensor  # (B, C, H, W) fp32
    weight: Tensor | None  # (B,) fp32; None: uniform


class Objective:
    """A schedule, a prediction, the distribution of training times and the weights of the loss.

    Args:
        logit_normal: mean and standard deviation of log(t / (1 - t)) (Esser et al. 2024, Section 3.1); None: t is
            uniform. A schedule with discrete steps rounds t to them.
        shift: of the times, see `shifted`; 1: none.
        min_snr: gamma of Min-SNR-gamma (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting
            Strategy", Section 3.4); None: no weights.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction | None = None,
        logit_normal: tuple[float, float] | None = None,
        shift: float = 1.0,
        min_snr: float | None = None,
    ):
        self.schedule, self.prediction = schedule, prediction or Noise()
        self.logit_normal, self.shift, self.min_snr = logit_normal, shift, min_snr

    def times(self, u: Tensor) -> Tensor:
        """Map numbers u (B,), uniform in [0, 1], to training times (B,) fp32 in [0, 1]."""
        if self.logit_normal:
            mean, std = self.logit_normal
            u = torch.sigmoid(mean + std * torch.special.ndtri(u))
        return shifted(u, self.shift)

    def at(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Task:
        """Return the task at times t (B,) fp32 in [0, 1]; x_0, noise: (B, C, H, W) fp32."""
        alpha, sigma, time = self.schedule.levels(t)
        target = _combined(*self.prediction.parts(alpha, sigma), x_0, noise)
        return Task(mix(alpha, x_0, sigma, noise), time, target, self._weight(alpha, sigma))

    def __call__(self, x_0: Tensor, noise: Tensor, u: Tensor) -> Task:
        """Return the task of a training step; u (B,) fp32 is uniform in [0, 1)."""
        return self.at(x_0, noise, self.times(u))

    def loss(
        self, network: Callable[..., Tensor], x_0: Tensor, noise: Tensor, u: Tensor, **conditions: Tensor
    ) -> Tensor:
        """Return the loss of a training step, `mse_loss`, 0-d fp32: the one the trainer, the benchmarks and guards run.

        Args:
            network: `network(x_t, time, **conditions)` -> (B, C, H, W), of any floating dtype.
            x_0, noise, u: as in `__call__`.
            conditions: y (B,) int64, or context (B, T, C), by name.
        """
        return self.loss_at(network, x_0, noise, self.times(u), **conditions)

    def loss_at(
        self, network: Callable[..., Tensor], x_0: Tensor, noise: Tensor, t: Tensor, **conditions: Tensor
    ) -> Tensor:
        """Return the same loss at times t (B,) fp32 in [0, 1]."""
        task = self.at(x_0, noise, t)
        return mse_loss(network(task.x_t, task.time, **conditions), task.target, task.weight)

    def _weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Return the weights (B,) that amount to min(SNR, gamma) on the squared error in x_0, where SNR = (alpha /
        sigma)^2.

        The error in x_0 is the prediction's times sigma / determinant. The weights are min(1, gamma / SNR) for eps,
        min(SNR, gamma) / (SNR + 1) for v, and min((1 - t)^2, gamma t^2) for a flow's velocity.
        """
        if self.min_snr is None:
            return None
        alpha, sigma = alpha.clamp(min=TINY), sigma.clamp(min=TINY)
        return torch.minimum(alpha**2, self.min_snr * sigma**2) / self.prediction.determinant(alpha, sigma) ** 2


def _combined(p: float | Tensor, q: float | Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
    """Return p x_0 + q noise; factors of 0 and 1 cost nothing, so that eps is the noise itself."""
    terms = []
    for part, value in ((p, x_0), (q, noise)):
        if isinstance(part, Tensor):
            terms.append(part.view(-1, 1, 1, 1) * value)
        elif part:
            terms.append(value if part == 1 else part * value)
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def mse_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return (output - target)^2 in fp32, averaged over C, H, W, weighted, and averaged over the batch (paper,
    Equation 1).
    """
    each = (output.float() - target.float()).square().flatten(1).mean(dim=1)  # (B,)
    return (each if weight is None else weight * each).mean()
