"""Samplers: from noise x_T to x_0 with a given number of network evaluations.

Equations: DPM-Solver (Lu et al. 2022, Algorithms 1 and 2), DPM-Solver++ (Lu et al. 2022b), score SDE (Song et al. 2021),
Heun's method as in Karras et al. 2022 (Algorithm 1).
"""

import numpy as np

from uvit_fast.diffusion.predictions import DATA, NOISE, VELOCITY
from uvit_fast.diffusion.schedules import FlowSchedule, Schedule, VPSchedule, shifted
from uvit_fast.diffusion.stages import Stage, Staged

TWICE = 2 + 1e-6  # how many times as long as the step on which a slope was measured a step may be


class DPMSolverSinglestep(Staged):
    """DPM-Solver "fast", noise prediction: intervals of order 3, the last ones lower so that the evaluations add up.

    50 evaluations are 16 intervals of order 3 and one of order 2. The published sampler of the VP models. With fewer, intervals too long
    for their order (`_lowered`) become steps of order 1 between the same times.
    """

    solves_for = NOISE  # m

    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        orders = fast_orders(steps)
        knots = np.cumsum([0, *orders])
        if (spacing or schedule.spacing) == "logsnr":  # the groups are uniform in lambda, and so are the times inside
            ends = np.linspace(schedule.lambda_(schedule.t_max), schedule.lambda_(schedule.t_min), len(orders) + 1)
            intervals = [
                schedule.time_of_lambda(np.linspace(a, b, order + 1))
                for a, b, order in zip(ends[:-1], ends[1:], orders)
            ]
        else:  # one grid of `steps` intervals, grouped; inner times are grid points
            grid = self._grid(schedule, steps, spacing)
            intervals = [grid[a : b + 1] for a, b in zip(knots[:-1], knots[1:])]
        if steps < schedule.published_steps or spacing not in (None, schedule.spacing):  # the published ones stay
            intervals = [part for times in intervals for part in _lowered(schedule, times)]
        return [stage for times in intervals for stage in self._interval(schedule, times)]

    def _interval(self, schedule: Schedule, times: np.ndarray) -> list[Stage]:
        """The stages from times[0] to times[-1]: order len(times) - 1, with inner evaluations at the times between."""
        carry, gain, sign = self._frame(schedule, times)
        lam = schedule.lambda_(times)
        h = lam - lam[0]  # from the interval's start to each of its times
        phi = np.expm1(sign * h)  # e^h - 1 for noise prediction, e^-h - 1 for data prediction
        stages = []
        for i in range(1, len(times)):
            weights = np.zeros(i)
            weights[0] = phi[i]
            if i > 1:  # a difference of outputs, D = m_{i-1} - m_0, stands in for the derivative
                slope = phi[i] / 2 if len(times) == 3 else sign * phi[i] / h[i] - 1  # order 2, order 3
                weights[[0, i - 1]] += slope * h[i] / h[i - 1] * np.array([-1, 1])
            stages.append(
                self._stage(
                    schedule,
                    times[i - 1],
                    self.solves_for,
                    start=carry[i],
                    outputs=-gain[i] * weights,
                    last=i == len(times) - 1,
                )
            )
        return stages

    def _frame(self, schedule: Schedule, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """What the first state is multiplied with, what the outputs are, and the sign of h in the exponential."""
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        return (sigma / sigma[0], alpha, -1) if self.solves_for == DATA else (alpha / alpha[0], sigma, 1)

    def _grid(self, schedule: Schedule, steps: int, spacing: str | None) -> np.ndarray:
        """One of `steps` intervals. Solved for the data, a last step of order 1 may be to lambda = infinity, where there is no noise."""
        return shifted(schedule.grid(steps, spacing or schedule.spacing, to_data=self.solves_for == DATA), self.shift)


class DPMSolverPPSinglestep(DPMSolverSinglestep):
    """DPM-Solver++ "fast", data prediction without thresholding. The published sampler of the SD-schedule models."""

    solves_for = DATA


class DPMSolverPPMultistep(DPMSolverPPSinglestep):
    """DPM-Solver++ 2M: one evaluation an interval, second order through the previous output; good from 10 to 25 steps.

    Uniform in time, the SD schedule's last interval is several times as long in lambda as the one before: a step more than twice as long
    as the last one is of order 1, as diffusers' last one is (`euler_at_final`). A step of h > 1 in lambda, which there are with
    ten evaluations or fewer, takes 1/h^2 of the second-order term: with all of it such steps can be worse than DDIM's. Both were found on
    exact mixtures of Gaussians, of which VP spaced in time is the one case left: two points, a third more than DDIM's error of 0.002.
    """

    keep = 1

    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        times = self._grid(schedule, steps, spacing)
        lam = schedule.lambda_(times)
        stages = []
        for i in range(steps):
            carry, gain, sign = self._frame(schedule, times[i : i + 2])
            h = lam[i + 1] - lam[i]
            weights = np.array([1.0])
            if i > 0:  # D = (1 + 1 / 2r) m_i - m_{i-1} / 2r, with r the last interval over this one
                last = lam[i] - lam[i - 1]
                half = 0.5 * h / last * min(1.0, 1 / h**2) if h <= TWICE * last else 0.0
                weights = np.array([-half, 1 + half])
            stages.append(
                self._stage(
                    schedule,
                    times[i],
                    self.solves_for,
                    start=carry[1],
                    outputs=-gain[1] * np.expm1(sign * h) * weights,
                )
            )
        return stages


class EulerMaruyama(Staged):
    """The reverse VP-SDE on the times {0} and linspace(1e-3, 1, steps); the last step draws no noise.

    x_s = x + (beta x / 2 + beta score) d + sqrt(beta d) z, with d = t - s and score = -eps / sigma_t.
    """

    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        if spacing is not None:
            raise ValueError(f"spacing: Euler-Maruyama has times of its own; expected none, got {spacing!r}")
        if not isinstance(schedule, VPSchedule):
            raise ValueError(f"Euler-Maruyama solves the VP-SDE: expected VPSchedule, got {type(schedule).__name__}")
        times = np.concatenate([[0.0], np.linspace(1e-3, 1, steps)]) if steps > 1 else np.array([0.0, 1.0])
        stages = []
        for t, s in zip(times[:0:-1], times[-2::-1]):
            rate = schedule.beta(t) * (t - s)
            stages.append(
                self._stage(
                    schedule,
                    t,
                    NOISE,
                    start=1 + rate / 2,
                    outputs=[-rate / schedule.sigma(t)],
                    noise=np.sqrt(rate) if s > 0 else 0.0,
                )
            )
        return stages


class Euler(Staged):
    """The ODE of a flow, dx / dt = eps - x_0, on times uniform from 1 to 0: x_s = x + (s - t) dx / dt.

    A network that predicts eps says in pure noise nothing of the data: with it, sampling starts at t = 0.999.
    """

    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        name = type(self).__name__
        if not isinstance(schedule, FlowSchedule):
            raise ValueError(f"{name} solves the ODE of a flow: expected FlowSchedule, got {type(schedule).__name__}")
        if spacing not in (None, "time"):
            raise ValueError(f"spacing: {name}'s times are uniform in t; expected time or none, got {spacing!r}")
        orders = self._orders(steps)
        first = 1.0 if self.prediction.determinant(0.0, 1.0) else schedule.t_max
        return self._along(schedule, shifted(np.linspace(first, 0, len(orders) + 1), self.shift), orders)

    def _along(self, schedule: Schedule, times: np.ndarray, orders: list[int]) -> list[Stage]:
        stages = []
        for t, s, order in zip(times[:-1], times[1:], orders):
            stages.append(self._stage(schedule, t, VELOCITY, 1.0, [s - t], last=order == 1))
            if order == 2:  # Heun's: once more from the start, with the mean of the slopes at both ends
                stages.append(self._stage(schedule, s, VELOCITY, 1.0, [(s - t) / 2] * 2))
        return stages

    def _orders(self, steps: int) -> list[int]:
        """Of the intervals; they add up to `steps`."""
        return [1] * steps


class Heun(Euler):
    """Two evaluations an interval, of second order. The last interval is a step of Euler's, since some predictions say nothing of the
    velocity at t = 0; with an even number of evaluations the first one is another.
    """

    def _orders(self, steps: int) -> list[int]:
        return [1] * (steps > 1 and steps % 2 == 0) + [2] * ((steps - 1) // 2) + [1]


def fast_orders(steps: int) -> list[int]:
    """The orders of DPM-Solver "fast", which add up to `steps`: 3, ..., 3 and then 2, 1 or 1 or 2."""
    threes = steps // 3
    tail = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    return [3] * (threes - (steps % 3 == 0)) + tail


def _lowered(schedule: Schedule, times: np.ndarray) -> list[np.ndarray]:
    """An interval with its inner times, or the steps of order 1 between them where a higher order would follow a slope too far: over more
    than twice the step that it was measured on (the end of a grid uniform in time), or over more than 2 in lambda.

    Both overshoot, noise prediction by e^h: two evaluations of the VP schedule, h = 10.8, gave 200 times DDIM's error.
    """
    h = np.diff(schedule.lambda_(times))
    if len(h) == 1 or (h.sum() <= 2 and (h[1:] <= TWICE * h[:-1]).all()):
        return [times]
    return [times[i : i + 2] for i in range(len(h))]
