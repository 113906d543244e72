"""Flows and predictions: each solver at its order on exact velocities, as diffusers' where settings coincide, and one
exact network is the same samples whatever it predicts.
"""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from tests.diffusion.exact import MEAN, SPREAD, nonlinear_eps, run_in_float64
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.predictions import Data, Noise, V, Velocity
from uvit_fast.diffusion.samplers import (
    DPMSolverPPMultistep,
    DPMSolverPPSinglestep,
    DPMSolverSinglestep,
    Euler,
    EulerMaruyama,
    Heun,
)
from uvit_fast.diffusion.schedules import FlowSchedule, SDSchedule, SiTFlowSchedule, VPSchedule

FLOW = FlowSchedule()
DPM = [DPMSolverSinglestep, DPMSolverPPSinglestep, DPMSolverPPMultistep]


def exact(schedule, prediction, sampler, mean=MEAN, spread=SPREAD):
    """The exact prediction for data ~ N(mean, spread^2), at the stages' own times, from the posterior mean of x_0."""
    stages = iter(sampler.stages)

    def predict(x, time):
        t = next(stages).t
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        x_0 = mean + gain * (x.double() - alpha * mean)
        p, q = prediction.parts(alpha, sigma)
        return p * x_0 + (q / sigma * (x.double() - alpha * x_0) if sigma else q * 0.0)

    return predict


def solution(first, last, x, mean=MEAN, spread=SPREAD):
    """The ODE of a flow maps quantiles to quantiles between two times."""
    a, s = 1 - np.array([first, last]), np.array([first, last])
    deviation = np.sqrt(a**2 * spread**2 + s**2)
    return a[1] * mean + deviation[1] * (x.double() - a[0] * mean) / deviation[0]


@pytest.mark.parametrize(
    ("solver", "spacing", "order", "counts"),
    [
        (Euler, None, 1, (80, 160, 320)),
        (Heun, None, 2, (79, 159, 319)),
        (Heun, None, 2, (80, 160, 320)),  # even: two steps of Euler's
        (DPMSolverPPMultistep, "logsnr", 2, (160, 320, 640)),
        (DPMSolverPPSinglestep, "logsnr", 3, (191, 383, 767)),
        (DPMSolverSinglestep, "logsnr", 3, (191, 383, 767)),
    ],
)
def test_error_falls_at_the_solvers_order_on_a_gaussians_exact_velocity(solver, spacing, order, counts):
    """In fp64, so that rounding does not hide the order; to the time at which the solver ends."""
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    errors = []
    for steps in counts:
        sampler = solver(FLOW, steps, spacing, Velocity())
        x = run_in_float64(sampler, exact(FLOW, Velocity(), sampler), x_T)
        end = FLOW.t_min if spacing else 0.0
        errors.append((x - solution(sampler.stages[0].t, end, x_T)).abs().max().item())
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (slopes > order - 0.2).all(), (errors, slopes)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 20, 49, 50, 51])
@pytest.mark.parametrize("solver", [*DPM, Euler, Heun])
def test_a_flow_is_solved_in_exactly_the_evaluations_that_were_given(solver, steps):
    """In fp32, uniform in time, as users run it: at fifty within a tenth of the spread, and never further off than a
    step of DDIM.
    """
    sampler = solver(FLOW, steps, prediction=Velocity())
    times = np.array([stage.t for stage in sampler.stages])
    assert len(times) == steps and times[0] == (1.0 if solver in (Euler, Heun) else 0.999)
    assert times[-1] > 0 and (np.diff(times) <= 0).all()
    x_T = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    error = (sampler(exact(FLOW, Velocity(), sampler), x_T) - solution(times[0], 0.0, x_T)).abs().max()
    assert error < (SPREAD / 10 if steps >= 49 else 2.1 * SPREAD)


ALIKE = [
    *[(VPSchedule(), solver, p) for solver in (*DPM, EulerMaruyama) for p in (V(), Data())],
    *[(SDSchedule(), solver, p) for solver in DPM for p in (V(), Data())],
    *[(FLOW, solver, p) for solver in (*DPM, Euler, Heun) for p in (V(), Data(), Noise())],
]


@pytest.mark.parametrize(("schedule", "solver", "prediction"), ALIKE)
def test_one_exact_network_gives_the_same_samples_whatever_it_predicts(schedule, solver, prediction):
    """In fp64 but for Euler-Maruyama's noise. With eps Euler and Heun start where there is a signal, 0.001 later."""
    x_T = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = []
    for each in (Velocity() if schedule is FLOW else Noise(), prediction):
        sampler = solver(schedule, 12, prediction=each)
        eps_fn = exact(schedule, each, sampler)
        noisy = sampler.draws_noise
        samples.append(sampler(eps_fn, x_T, torch.arange(16)) if noisy else run_in_float64(sampler, eps_fn, x_T))
    late = solver in (Euler, Heun) and isinstance(prediction, Noise)
    tolerance = 5e-3 if late else 1e-5 if noisy else 1e-9
    torch.testing.assert_close(*samples, rtol=tolerance, atol=tolerance)
    assert samples[0].std() > 0.3


def test_networks_in_sits_terms_are_told_and_say_the_same():
    """They receive 1 - t, 1 at the data, and predict x_0 - eps."""
    x_T = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for solver in (*DPM, Euler, Heun):
        ours = solver(FLOW, 9, prediction=Velocity())
        sit = solver(SiTFlowSchedule(), 9, prediction=Velocity(to_data=True))
        velocity = nonlinear_eps(FLOW)
        theirs = sit(lambda x, time, v=velocity: -v(x, 1000 * (1 - time)), x_T)
        torch.testing.assert_close(ours(velocity, x_T), theirs, rtol=1e-4, atol=1e-4)


def diffusers_sample(scheduler, velocity, x):
    """With the network's time from their sigmas: some of their timesteps are cut to whole numbers."""
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, 1000 * scheduler.sigmas[i].expand(len(x))), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [5, 12, 30])
def test_multistep_is_diffusers_on_its_own_grid_of_flow_sigmas(steps, shift):
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    scheduler.set_timesteps(steps)
    sampler = DPMSolverPPMultistep(FLOW, steps, prediction=Velocity(), shift=shift)
    np.testing.assert_allclose([s.t for s in sampler.stages], scheduler.sigmas[:-1], rtol=1e-6)
    check_alike(sampler, scheduler)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_diffusers_on_times_uniform_to_the_data(shift):
    """Its own grid ends with a step from 0.001; pipelines such as Flux's hand it this one."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    sampler = Euler(FLOW, 12, prediction=Velocity(), shift=shift)
    np.testing.assert_allclose([s.t for s in sampler.stages], scheduler.sigmas[:-1], rtol=1e-6)
    check_alike(sampler, scheduler)


def test_heun_is_diffusers_on_its_times():
    sampler = Heun(FLOW, 11, prediction=Velocity())
    sampler._stages = sampler._along(FLOW, np.array([*np.linspace(1, 1e-3, 6), 0.0]), [2] * 5 + [1])
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    sampler._tables = {}
    check_alike(sampler, scheduler)


def check_alike(sampler, scheduler):
    velocity, x_T = nonlinear_eps(FLOW), torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = diffusers_sample(scheduler, lambda x, t: velocity(x, t).float(), x_T)
    torch.testing.assert_close(sampler(velocity, x_T), theirs, rtol=1e-4, atol=1e-4)


def test_guidance_of_any_prediction_is_guidance_of_eps():
    """The conversion is linear in the output and the state has one value,
    so both branches may be combined before it.
    """

    def model(x, t, y, convert):
        eps = torch.tanh(x + y.view(-1, 1, 1, 1))
        return convert[0] * x + convert[1] * eps

    x_T, y = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, -1.0])
    samples = []
    for prediction in (Noise(), Velocity(), Data()):
        sampler = DPMSolverPPMultistep(FLOW, 6, prediction=prediction)
        stages = iter(sampler.stages)

        def predict(x, t, y, prediction=prediction, stages=stages):
            level = float(FLOW.alpha(s := next(stages).t)), s
            parts = prediction.parts(*level)
            return model(x, t, y, Noise().convert(parts, *level))

        samples.append(sampler(Guidance(predict, {"y": y}, {"y": torch.tensor(0.0)}, 0.7), x_T))
    for each in samples[1:]:
        torch.testing.assert_close(each, samples[0], rtol=1e-4, atol=1e-4)


def test_a_prediction_is_converted_in_the_solvers_own_update():
    """No pass over the state beside it: eps of a velocity is x + (1 - t) v, x_0 is x - t v, and an output that fits is
    taken as it is.
    """
    for solver, expected in ((DPMSolverSinglestep, lambda t: (1, 1 - t)), (DPMSolverPPMultistep, lambda t: (1, -t))):
        for stage in solver(FLOW, 5, prediction=Velocity()).stages:
            np.testing.assert_allclose(stage.update[:2], expected(stage.t), rtol=1e-12)
    for solver, prediction in ((Euler, Velocity()), (DPMSolverPPMultistep, Data()), (DPMSolverSinglestep, Noise())):
        assert all(stage.update[:2] == (0, 1) for stage in solver(FLOW, 5, prediction=prediction).stages)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Euler(VPSchedule(), 5), "Euler solves the ODE of a flow: expected FlowSchedule, got VPSchedule"),
        (lambda: Heun(SDSchedule(), 5), "Heun solves the ODE of a flow"),
        (lambda: Euler(FLOW, 5, "karras"), "Euler's times are uniform in t; expected time or none, got 'karras'"),
        (lambda: EulerMaruyama(FLOW, 5), "solves the VP-SDE: expected VPSchedule, got FlowSchedule"),
        (lambda: DPMSolverPPMultistep(SDSchedule(), 5, shift=3.0), "shift: moves a flow's times"),
        (lambda: DPMSolverPPMultistep(FLOW, 5, "karras", shift=3.0), "expected 1 for others, got 3.0"),
    ],
)
def test_what_does_not_go_together_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
