"""The schedules are the published ones."""

import math

import numpy as np
import pytest
import torch

from uvit_fast.diffusion.schedules import FlowSchedule, SDSchedule, SiTFlowSchedule, VPSchedule, shifted

SCHEDULES = [VPSchedule(), SDSchedule(), FlowSchedule()]


def test_vp_is_the_integral_of_its_beta():
    """log alpha_t^2 = -(0.1 t + 9.95 t^2), which is minus the integral of beta = 0.1 + 19.9 s."""
    vp = VPSchedule()
    for t in (1e-4, 0.3, 1.0):
        assert 2 * vp.log_alpha(t) == pytest.approx(-(0.1 * t + 9.95 * t**2), rel=1e-12)
        s = np.linspace(0, t, 100_001)
        assert 2 * vp.log_alpha(t) == pytest.approx(-np.trapezoid(vp.beta(s), s), rel=1e-8)
    assert vp.network_time(0.5) == 499.5


def test_sd_is_the_product_of_its_alphas_and_linear_between():
    sd = SDSchedule()
    betas = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.0120) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
    assert sd.alpha(1e-3) == pytest.approx(math.sqrt(1 - betas[0]), rel=1e-12)
    assert sd.alpha(1.0) ** 2 == pytest.approx(math.prod(1 - b for b in betas), rel=1e-9)
    assert sd.log_alpha(0.5005) == pytest.approx((sd.log_alpha(0.5) + sd.log_alpha(0.501)) / 2, rel=1e-12)
    assert sd.network_time(0.0615) == pytest.approx(61.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_inverts_and_falls_with_time(schedule):
    t = np.linspace(schedule.t_min, schedule.t_max, 777)
    np.testing.assert_allclose(schedule.time_of_lambda(schedule.lambda_(t)), t, rtol=1e-9)
    assert (np.diff(schedule.lambda_(t)) < 0).all()
    power = 1 if isinstance(schedule, FlowSchedule) else 2
    np.testing.assert_allclose(schedule.alpha(t) ** power + schedule.sigma(t) ** power, 1)
    np.testing.assert_allclose(schedule.lambda_(t), np.log(schedule.alpha(t) / schedule.sigma(t)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "u", "network_time", "t"),
    [
        (VPSchedule(), 0.25, 249.75, 0.25),  # continuous: t = u
        (SDSchedule(), 0.0, 1.0, 0.001),  # the first of the discrete steps
        (SDSchedule(), 0.2509, 251.0, 0.251),  # n = floor(1000 u) + 1
        (SDSchedule(), 1 - 2**-24, 1000.0, 1.0),  # the largest u of fp32
        (FlowSchedule(), 0.25, 250.0, 0.25),
        (SiTFlowSchedule(), 0.25, 0.75, 0.25),  # 1 at the data
    ],
)
def test_training_noise_matches_what_sampling_assumes(schedule, u, network_time, t):
    x_0, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    x_t, time = schedule.add_noise(x_0, noise, torch.tensor([u]))
    expected = float(schedule.alpha(t)) * x_0 + float(schedule.sigma(t)) * noise
    torch.testing.assert_close(x_t, expected, rtol=1e-5, atol=1e-6)
    assert time.dtype == torch.float32 and time.item() == pytest.approx(network_time)


def test_sd_draws_every_step_equally_often():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    _, n = SDSchedule().add_noise(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), u)
    counts = torch.bincount(n.long(), minlength=1001)
    assert counts[0] == 0 and counts[1:].min() > 130 and counts[1:].max() < 270  # 200 each, five standard deviations


def test_a_flow_reaches_both_ends_where_lambda_is_infinite():
    """diffusers' grid for flows, 0.999 to 0; a solver that needs a finite lambda ends at 0.001."""
    flow = FlowSchedule()
    np.testing.assert_allclose(flow.grid(4, "time", to_data=True), [0.999, 0.74925, 0.4995, 0.24975, 0.0])
    assert flow.grid(4, "time")[-1] == 1e-3 and flow.lambda_(np.array([0.0]))[0] == np.inf
    assert VPSchedule().grid(4, "time", to_data=True)[-1] == 1e-4
    assert shifted(0.5, 3.0) == 0.75 and shifted(1.0, 3.0) == 1.0 and shifted(0.0, 3.0) == 0.0
    assert shifted(torch.tensor(1.0), 0.01) == 1.0  # in fp32, too: times stay in [0, 1]
