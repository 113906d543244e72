"""Samplers: from noise x_T to x_0 with a given number of network evaluations.

Equations: DPM-Solver (Lu et al. 2022, Algorithms 1 and 2), DPM-Solver++ (Lu et al. 2022b), score SDE (Song et al.
2021), Heun's method as in Karras et al. 2022 (Algorithm 1).
"""

import numpy as np

from uvit_fast.diffusion.predictions import DATA, NOISE, VELOCITY
from uvit_fast.diffusion.schedules import FlowSchedule, Schedule, VPSchedule, shifted
from uvit_fast.diffusion.stages import Stage, Staged

TWICE = 2 + 1e-6  # a step may be this many times as long as the one on which its slope was measured


class DPMSolverSinglestep(Staged):
    """DPM-Solver "fast", noise prediction: intervals of order 3, the last ones of lower order so that the evaluations
    add up. The published sampler of the VP models.

    50 evaluations are 16 intervals of order 3 and one of order 2. With fewer, intervals too long for their order
    (`_lowered`) become steps of order 1 between the same times.
    """

    solves_for = NOISE  # m in the update

    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        orders = fast_orders(steps)
        knots = np.cumsum([0, *orders])
        if (spacing or schedule.spacing) == "logsnr":  # intervals are uniform in lambda, and so are the times inside
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
        """Return the stages from times[0] to times[-1], of order len(times) - 1, with inner evaluations at the times
        between.
        """
        carry, gain, sign = self._frame(schedule, times)
        lam = schedule.lambda_(times)
        h = lam - lam[0]  # from the interval's start to each of its times
        phi = np.expm1(sign * h)  # e^h - 1 for noise prediction, e^-h - 1 for data prediction
        stages = []
        for i in range(1, len(times)):
            weights = np.zeros(i)
            weights[0] = phi[i]
            if i > 1:  # a difference of outputs, D = m_{i-1} - m_0, replaces the derivative
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
        """Return the factor of the first state, that of the outputs, and the sign of h in the exponential."""
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        return (sigma / sigma[0], alpha, -1) if self.solves_for == DATA else (alpha / alpha[0], sigma, 1)

    def _grid(self, schedule: Schedule, steps: int, spacing: str | None) -> np.ndarray:
        """Return a grid of `steps` intervals. With data prediction, a last step of order 1 may end at lambda =
        infinity, where there is no noise.
        """
        return shifted(schedule.grid(steps, spacing or schedule.spacing, to_data=self.solves_for == DATA), self.shift)


class DPMSolverPPSinglestep(DPMSolverSinglestep):
    """DPM-Solver++ "fast", data prediction without thresholding. The published sampler of the SD-schedule models."""

    solves_for = DATA


class DPMSolverPPMultistep(DPMSolverPPSinglestep):
    """DPM-Solver++ 2M: one evaluation per interval, second order through the previous output; good for 10 to 25 steps.

    On a grid uniform in time, the SD schedule's last interval is several times as long in lambda as the one before. A
    step more than twice as long as the previous one is therefore of order 1, as diffusers' last one is
    (`euler_at_final`). A step of h > 1 in lambda, as in runs of ten evaluations or fewer, takes 1/h^2 of the
    second-order term: with all of it such steps can be worse than DDIM's. Both rules were found on exact mixtures of
    Gaussians. One case there is still worse than DDIM: VP spaced in time, two points, by a third more than DDIM's error
    of 0.002.
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
            if i > 0:  # D = (1 + 1 / 2r) m_i - m_{i-1} / 2r, with r the previous interval over this one
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
    """The reverse VP-SDE on the times {0} and linspace(1e-3, 1, steps); the last step adds no noise.

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

    In pure noise a prediction of eps says nothing about the data: with one, sampling starts at t = 0.999.
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
            if order == 2:  # Heun: from the start again, with the mean of the slopes at both ends
                stages.append(self._stage(schedule, s, VELOCITY, 1.0, [(s - t) / 2] * 2))
        return stages

    def _orders(self, steps: int) -> list[int]:
        """Return the orders of the intervals; they add up to `steps`."""
        return [1] * steps


class Heun(Euler):
    """Heun's method: two evaluations per interval, second order. The last interval is an Euler step, since some
    predictions do not determine the velocity at t = 0; with an even number of evaluations, so is the first.
    """

    def _orders(self, steps: int) -> list[int]:
        return [1] * (steps > 1 and steps % 2 == 0) + [2] * ((steps - 1) // 2) + [1]


def fast_orders(steps: int) -> list[int]:
    """Return the orders of DPM-Solver "fast", which add up to `steps`: 3, ..., 3, then 2, 1 or 1 or 2."""
    threes = steps // 3
    tail = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    return [3] * (threes - (steps % 3 == 0)) + tail


def _lowered(schedule: Schedule, times: np.ndarray) -> list[np.ndarray]:
    """Return an interval with its inner times, or steps of order 1 between them where a higher order would extrapolate
    a slope too far: over more than twice the step on which it was measured (the end of a grid uniform in time), or over
    more than 2 in lambda.

    Both overshoot, noise prediction by e^h: two evaluations of the VP schedule, h = 10.8, gave 200 times DDIM's error.
    """
    h = np.diff(schedule.lambda_(times))
    if len(h) == 1 or (h.sum() <= 2 and (h[1:] <= TWICE * h[:-1]).all()):
        return [times]
    return [times[i : i + 2] for i in range(len(h))]
