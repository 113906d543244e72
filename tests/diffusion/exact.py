"""What samplers are tested on: Gaussian data, whose solution is known, and a nonlinear network."""

import numpy as np
import torch

from uvit_fast.diffusion.samplers import DPMSolverPPMultistep, DPMSolverPPSinglestep, DPMSolverSinglestep

ODE = [DPMSolverSinglestep, DPMSolverPPSinglestep, DPMSolverPPMultistep]
MEAN, SPREAD = 1.5, 0.5  # of the Gaussian data whose score is known


def gaussian_eps(schedule, mean=MEAN, spread=SPREAD):
    """The exact noise prediction for data ~ N(mean, spread^2): eps = sigma_t (x - alpha_t mean) / var_t."""

    def eps_fn(x, time):
        t = (time[0].double() / schedule.network_time(1.0)).item()
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return sigma * (x.double() - alpha * mean) / (alpha**2 * spread**2 + sigma**2)

    return eps_fn


def gaussian_solution(schedule, x_T, mean=MEAN, spread=SPREAD):
    """The probability-flow ODE maps quantiles to quantiles: standardise at t_max, unstandardise at t_min."""
    a, s = (f(np.array([schedule.t_max, schedule.t_min])) for f in (schedule.alpha, schedule.sigma))
    deviation = np.sqrt(a**2 * spread**2 + s**2)
    return a[1] * mean + deviation[1] * (x_T.double() - a[0] * mean) / deviation[0]


class Recorder:
    """An eps_fn that keeps the times it was asked for."""

    def __init__(self):
        self.times = []

    def __call__(self, x, time):
        assert time.shape == (len(x),) and time.dtype == torch.float32
        self.times.append(time[0].item())
        return torch.zeros_like(x)


def times_of(sampler):
    recorder = Recorder()
    sampler(recorder, torch.randn(2, 1, 2, 2))
    return np.array(recorder.times)


def run_in_float64(sampler, eps_fn, x_T):
    """The sampler's loop, unchanged, on a state that stays float64."""

    class Double(torch.Tensor):
        def float(self):
            return self

    return sampler(eps_fn, x_T.as_subclass(Double)).as_subclass(torch.Tensor)


def nonlinear_eps(schedule):
    """A network that is nonlinear in x and t, so that agreement is not an accident of linear problems."""

    def eps_fn(x, time):
        t = time.double().view(-1, 1, 1, 1) / schedule.network_time(1.0)
        return torch.tanh(x.double() * (1 + t)) + 0.1 * t

    return eps_fn
