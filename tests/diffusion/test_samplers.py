"""The samplers solve what they claim to solve, on the published grids, at their orders."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler

from uvit_fast.diffusion.samplers import (
    DPMSolverPPMultistep,
    DPMSolverPPSinglestep,
    DPMSolverSinglestep,
    EulerMaruyama,
    fast_orders,
)
from uvit_fast.diffusion.schedules import SDSchedule, VPSchedule

from .exact import MEAN, ODE, SPREAD, gaussian_eps, gaussian_solution, nonlinear_eps, run_in_float64, times_of


@pytest.mark.parametrize("schedule", [VPSchedule(), SDSchedule()])
@pytest.mark.parametrize("solver", ODE)
@pytest.mark.parametrize(
    "steps", [1, 2, 3, 4, 5, 6, 20, 49, 50, 51]
)  # each remainder, and those with nothing but a tail
def test_steps_are_network_evaluations_and_the_result_is_finite(solver, schedule, steps):
    sampler = solver(schedule, steps)
    times = times_of(sampler)
    assert len(times) == steps and times[0] == pytest.approx(schedule.network_time(1.0))
    assert (np.diff(times) < 0).all() and times[-1] > schedule.network_time(schedule.t_min)
    assert torch.isfinite(sampler(gaussian_eps(schedule), torch.randn(2, 1, 2, 2))).all()


def test_fast_spends_fifty_as_sixteen_threes_and_a_two():
    assert fast_orders(50) == [3] * 16 + [2]
    assert fast_orders(51) == [3] * 16 + [2, 1]
    assert fast_orders(52) == [3] * 17 + [1]
    assert [fast_orders(n) for n in (1, 2, 3)] == [[1], [2], [2, 1]]


def test_vp_grid_has_seventeen_intervals_uniform_in_lambda():
    vp = VPSchedule()
    lam = vp.lambda_(times_of(DPMSolverSinglestep(vp, 50)) / 999)
    ends = np.linspace(vp.lambda_(1.0), vp.lambda_(1e-4), 18)
    np.testing.assert_allclose(lam[0:48:3], ends[:16], rtol=1e-4, atol=1e-4)
    third = (ends[1] - ends[0]) / 3
    np.testing.assert_allclose(lam[1:48:3] - lam[0:48:3], third, rtol=1e-3)  # r1 = 1/3
    np.testing.assert_allclose(lam[2:48:3] - lam[0:48:3], 2 * third, rtol=1e-3)  # r2 = 2/3
    np.testing.assert_allclose(lam[49] - lam[48], (ends[1] - ends[0]) / 2, rtol=1e-3)  # the order-2 tail


def test_sd_grid_is_uniform_in_time_and_fractional_for_the_network():
    times = times_of(DPMSolverPPSinglestep(SDSchedule(), 50))
    np.testing.assert_allclose(times, np.linspace(1000, 1, 51)[:-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("solver", "schedule", "order"),
    [
        (DPMSolverSinglestep, VPSchedule(), 3),
        (DPMSolverPPSinglestep, VPSchedule(), 3),
        (DPMSolverPPMultistep, VPSchedule(), 2),
    ],
)
def test_error_falls_at_the_solvers_order(solver, schedule, order):
    """Doubling the intervals divides the error by 2^order, once they are fine enough for the leading term to lead.

    In fp64: the coefficients are, and so is the state here, so that rounding does not hide the order.
    """
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    exact = gaussian_solution(schedule, x_T)
    errors = []
    counts = (191, 383, 767) if order == 3 else (160, 320, 640)
    for steps in counts:
        sampler = solver(schedule, steps)
        x = run_in_float64(sampler, gaussian_eps_exact_times(schedule, sampler), x_T)
        errors.append((x - exact).abs().max().item())
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (slopes > order - 0.2).all(), (errors, slopes)


def gaussian_eps_exact_times(schedule, sampler):
    """As gaussian_eps, with the stages' own float64 times in place of what fp32 leaves of them."""
    eps_at = gaussian_eps(schedule)
    times = iter([stage.time for stage in sampler.stages])
    return lambda x, _: eps_at(x, torch.tensor([next(times)], dtype=torch.float64))


@pytest.mark.parametrize("solver", ODE)
@pytest.mark.parametrize("schedule", [VPSchedule(), SDSchedule()])
def test_samples_converge_to_the_exact_solution_of_a_gaussian(solver, schedule):
    """In fp32, as users run it, also on the SD schedule, whose grid in time is coarse near the data."""
    x_T = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    exact = gaussian_solution(schedule, x_T)
    coarse, fine, finest = (
        (solver(schedule, n)(gaussian_eps(schedule), x_T) - exact).abs().max() for n in (50, 200, 1000)
    )
    assert coarse < SPREAD / 10 and fine < coarse / 4 and finest < 1e-3 * SPREAD


def test_euler_maruyama_samples_the_gaussian():
    """A thousand steps from noise give the data's mean and spread within the sampling error of 20,000 samples."""
    vp = VPSchedule()
    x_T = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    sampler = EulerMaruyama(vp, 1000)
    x = sampler(gaussian_eps(vp), x_T, generator=torch.Generator().manual_seed(1))
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - SPREAD) < 0.02
    assert sampler.stages[-1].update.noise == 0 and sampler.stages[-2].update.noise > 0
    times = times_of(sampler) / 999
    np.testing.assert_allclose(times, np.linspace(1e-3, 1, 1000)[::-1], rtol=1e-5)


def dpm_solver(x, eps, a, s, lam):
    """One interval of DPM-Solver (Lu et al. 2022, Algorithms 1 and 2): eps(x, i), alpha,
    sigma and lambda at its times.
    """
    h, r1, e0 = lam[-1] - lam[0], (lam[1] - lam[0]) / (lam[-1] - lam[0]), eps(x, 0)
    u1 = a[1] / a[0] * x - s[1] * np.expm1(r1 * h) * e0
    if len(lam) == 3:
        return a[2] / a[0] * x - s[2] * np.expm1(h) * e0 - s[2] / (2 * r1) * np.expm1(h) * (eps(u1, 1) - e0)
    r2, d1 = (lam[2] - lam[0]) / h, eps(u1, 1) - e0
    u2 = a[2] / a[0] * x - s[2] * np.expm1(r2 * h) * e0 - s[2] * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = eps(u2, 2) - e0
    return a[3] / a[0] * x - s[3] * np.expm1(h) * e0 - s[3] / r2 * (np.expm1(h) / h - 1) * d2


def dpm_solver_pp(x, eps, a, s, lam):
    """One interval of DPM-Solver++ (Lu et al. 2022b, singlestep, orders 2 and 3), in terms of the predicted data."""

    def data(x, i):
        return (x - s[i] * eps(x, i)) / a[i]

    h, r1, x0 = lam[-1] - lam[0], (lam[1] - lam[0]) / (lam[-1] - lam[0]), data(x, 0)
    u1 = s[1] / s[0] * x - a[1] * np.expm1(-r1 * h) * x0
    if len(lam) == 3:
        return s[2] / s[0] * x - a[2] * np.expm1(-h) * x0 - a[2] / (2 * r1) * np.expm1(-h) * (data(u1, 1) - x0)
    r2, d1 = (lam[2] - lam[0]) / h, data(u1, 1) - x0
    u2 = s[2] / s[0] * x - a[2] * np.expm1(-r2 * h) * x0 + a[2] * r2 / r1 * (np.expm1(-r2 * h) / (r2 * h) + 1) * d1
    d2 = data(u2, 2) - x0
    return s[3] / s[0] * x - a[3] * np.expm1(-h) * x0 + a[3] / r2 * (np.expm1(-h) / h + 1) * d2


@pytest.mark.parametrize(
    ("solver", "interval", "schedule"),
    [
        (DPMSolverSinglestep, dpm_solver, VPSchedule()),  # the published pairs: uniform in lambda, r = 1/3, 2/3
        (DPMSolverPPSinglestep, dpm_solver_pp, SDSchedule()),  # uniform in time, so every interval has its own r1, r2
    ],
)
def test_fifty_published_steps_are_the_papers_formulas(solver, interval, schedule):
    """The whole 50-NFE loop in fp64 against the papers' algorithms, written out, on a nonlinear network."""
    sampler, eps_at = solver(schedule, 50), nonlinear_eps(schedule)
    times = [stage.t for stage in sampler.stages] + [schedule.t_min]
    x = x_T = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for first in range(0, 50, 3):
        t = np.array(times[first : first + 4])
        network_time = [torch.tensor([schedule.network_time(v)], dtype=torch.float64) for v in t]
        x = interval(
            x, lambda x, i, n=network_time: eps_at(x, n[i]), schedule.alpha(t), schedule.sigma(t), schedule.lambda_(t)
        )
    exact_times = iter([torch.tensor([stage.time], dtype=torch.float64) for stage in sampler.stages])
    got = run_in_float64(sampler, lambda x, _: eps_at(x, next(exact_times)), x_T)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sampler(eps_at, x_T).double(), x, rtol=1e-4, atol=1e-4)  # in fp32, as users run it


def diffusers_sample(scheduler, eps_fn, x, times):
    for t in times:
        x = scheduler.step(eps_fn(x, t.expand(len(x))), t, x).prev_sample
    return x


SD_KEYWORDS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.0120, "beta_schedule": "scaled_linear"}
FINAL = {
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",
}  # no special last step, as in the published sampler


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_multistep_agrees_with_diffusers_where_the_grids_coincide(steps):
    """diffusers' grid is of integer times that end in alpha = 1; given our times and sigmas, its update must be ours,
    to the last step of order 1.
    """
    schedule = SDSchedule()
    scheduler = DPMSolverMultistepScheduler(**SD_KEYWORDS, **FINAL, euler_at_final=True)
    check_against_diffusers(scheduler, DPMSolverPPMultistep(schedule, steps), schedule, schedule.grid(steps, "time"))


@pytest.mark.parametrize(("spacing", "keyword"), [("logsnr", "use_lu_lambdas"), ("karras", "use_karras_sigmas")])
def test_spacings_are_those_of_diffusers(spacing, keyword):
    """The grid between the same ends, and the update on it: all steps of order 2, as none is much longer than the one
    before.
    """
    schedule = SDSchedule()
    scheduler = DPMSolverMultistepScheduler(**SD_KEYWORDS, **FINAL, **{keyword: True})
    times = schedule.grid(12, spacing)
    sigmas = schedule.sigma(times) / schedule.alpha(times)
    if spacing == "karras":
        np.testing.assert_allclose(scheduler._convert_to_karras(sigmas, 13), sigmas, rtol=1e-9)
    else:
        np.testing.assert_allclose(np.exp(scheduler._convert_to_lu(np.log(sigmas), 13)), sigmas, rtol=1e-9)
    check_against_diffusers(scheduler, DPMSolverPPMultistep(schedule, 12, spacing), schedule, times)


@pytest.mark.parametrize("solver", ODE)
@pytest.mark.parametrize("spacing", ["time", "logsnr", "karras"])
def test_every_spacing_leads_from_noise_to_the_exact_solution(solver, spacing):
    for schedule in (VPSchedule(), SDSchedule()):
        for steps in (1, 2, 20):
            stages = solver(schedule, steps, spacing).stages
            times = np.array([stage.t for stage in stages])
            assert len(times) == steps and times[0] == pytest.approx(1) and (np.diff(times) < 0).all()
        x_T = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
        error = solver(schedule, 200, spacing)(gaussian_eps(schedule), x_T) - gaussian_solution(schedule, x_T)
        assert error.abs().max() < SPREAD / 50
    default = solver(SDSchedule(), 50)
    assert default.stages == solver(SDSchedule(), 50, "time").stages != solver(SDSchedule(), 50, "logsnr").stages


def test_spacings_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="spacing: expected one of time, logsnr, karras, got 'sigma'"):
        DPMSolverSinglestep(VPSchedule(), 10, "sigma")
    with pytest.raises(ValueError, match="Euler-Maruyama has times of its own"):
        EulerMaruyama(VPSchedule(), 10, "time")


@pytest.mark.parametrize("kind", [("dpmsolver++", DPMSolverPPSinglestep), ("dpmsolver", DPMSolverSinglestep)])
def test_singlestep_of_order_two_agrees_with_diffusers(kind):
    """An interval of order 2 by itself, which diffusers computes by the same formula for any r1."""
    schedule, times = SDSchedule(), np.array([0.9, 0.6, 0.4])
    scheduler = DPMSolverSinglestepScheduler(**SD_KEYWORDS, algorithm_type=kind[0], solver_order=2, **FINAL)
    sampler = kind[1](schedule, 2)
    sampler._stages = sampler._interval(schedule, times)
    check_against_diffusers(scheduler, sampler, schedule, times)


def test_fast_lowers_orders_only_below_the_published_evaluations():
    """Fifty keep their order-2 interval, 4.2 times as long at its end; the same times, evaluated as often,
    otherwise.
    """
    orders = [len(stage.update.outputs) for stage in DPMSolverPPSinglestep(SDSchedule(), 50).stages]
    assert orders == [1, 2, 3] * 16 + [1, 2]
    few = DPMSolverPPSinglestep(SDSchedule(), 20).stages
    assert [len(stage.update.outputs) for stage in few] == [1, 2, 3] * 6 + [1, 1]
    np.testing.assert_allclose([stage.t for stage in few], np.linspace(1, 1e-3, 21)[:-1])
    assert [len(s.update.outputs) for s in DPMSolverSinglestep(VPSchedule(), 2).stages] == [1, 1]
    assert [len(s.update.outputs) for s in DPMSolverSinglestep(VPSchedule(), 20).stages] == [1, 2, 3] * 6 + [1, 2]


def check_against_diffusers(scheduler, sampler, schedule, times):
    x_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.timesteps = torch.from_numpy(1000 * times[:-1])
    scheduler.sigmas = torch.from_numpy(schedule.sigma(times) / schedule.alpha(times))
    eps_fn = nonlinear_eps(schedule)
    theirs = diffusers_sample(scheduler, eps_fn, x_T, scheduler.timesteps)
    ours = sampler(eps_fn, x_T)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-4, atol=2e-4)
