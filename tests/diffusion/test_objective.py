"""What the network is asked for: the targets, the times and the weights of the papers."""

import math

import numpy as np
import pytest
import torch

from uvit_fast.diffusion.objective import Objective, mse_loss
from uvit_fast.diffusion.predictions import DATA, NOISE, VELOCITY, Data, Noise, V, Velocity
from uvit_fast.diffusion.schedules import FlowSchedule, SDSchedule, SiTFlowSchedule, VPSchedule

X_0, EPS = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.0504, 0.4005, 0.9006])
PAIRS = [
    *[(schedule, prediction) for schedule in (VPSchedule(), SDSchedule()) for prediction in (Noise(), V(), Data())],
    *[(FlowSchedule(), prediction) for prediction in (Noise(), V(), Data(), Velocity())],
    (SiTFlowSchedule(), Velocity(to_data=True)),
]


def column(values):
    return values.view(-1, 1, 1, 1)


def test_targets_are_those_of_the_papers():
    flow, vp = FlowSchedule(), VPSchedule()
    assert Objective(vp)(X_0, EPS, T).target is EPS  # of no cost
    assert Objective(vp, Data())(X_0, EPS, T).target is X_0
    alpha, sigma = (column(torch.from_numpy(f(T.double().numpy()))).float() for f in (vp.alpha, vp.sigma))
    torch.testing.assert_close(Objective(vp, V())(X_0, EPS, T).target, alpha * EPS - sigma * X_0)
    task = Objective(flow, Velocity())(X_0, EPS, T)
    torch.testing.assert_close(task.target, EPS - X_0)
    torch.testing.assert_close(task.x_t, (1 - column(T)) * X_0 + column(T) * EPS)
    assert torch.equal(task.time, 1000 * T) and task.weight is None
    sit = Objective(SiTFlowSchedule(), Velocity(to_data=True))(X_0, EPS, T)
    assert torch.equal(sit.target, X_0 - EPS) and torch.equal(sit.time, 1 - T) and torch.equal(sit.x_t, task.x_t)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_data_noise_and_velocity_are_recovered_from_every_prediction(schedule, prediction):
    """By the one conversion, in float64, from what training asks for."""
    task = Objective(schedule, prediction)(X_0, EPS, T)
    for i, t in enumerate(T.double().numpy()):
        t = (math.floor(1000 * t) + 1) / 1000 if isinstance(schedule, SDSchedule) else t
        for wanted, expected in ((DATA, X_0), (NOISE, EPS), (VELOCITY, EPS - X_0)):
            on_x, on_output = prediction.convert(wanted, schedule.alpha(t), schedule.sigma(t))
            got = float(on_x) * task.x_t[i] + float(on_output) * task.target[i]
            torch.testing.assert_close(got, expected[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_min_snr_weights_the_same_error_of_the_data_alike(schedule, prediction):
    """Of a network that errs in x_0, so in its prediction: weight times squared error is min(SNR, 5) times that of x_0
    (Hang et al. 2023).
    """
    task, error = Objective(schedule, prediction, min_snr=5.0)(X_0, EPS, T), 0.1 * torch.randn(X_0.shape)
    alpha, sigma, _ = schedule.levels(T)
    p, q = prediction.parts(alpha, sigma)
    wrong = X_0 + error
    eps = (task.x_t - column(alpha) * wrong) / column(sigma)
    p, q = (column(part) if isinstance(part, torch.Tensor) else part for part in (p, q))
    snr = (alpha / sigma) ** 2
    expected = (snr.clamp(max=5) * error.square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(mse_loss(p * wrong + q * eps, task.target, task.weight), expected, rtol=2e-3, atol=0)


def test_min_snr_is_the_published_form_of_each_prediction_and_finite_at_the_ends():
    ends = torch.tensor([0.0, 0.3, 0.8, 1.0])
    for schedule in (VPSchedule(), FlowSchedule()):
        alpha, sigma, _ = schedule.levels(ends)
        snr = (alpha / sigma) ** 2
        forms = {Noise: (5 / snr).clamp(max=1), Data: snr.clamp(max=5)}
        if isinstance(schedule, FlowSchedule):
            forms[Velocity] = torch.minimum((1 - ends) ** 2, 5 * ends**2)
        else:
            forms[V] = snr.clamp(max=5) / (snr + 1)
            forms[V][0] = 0.0  # its limit
        for kind, expected in forms.items():
            weight = Objective(schedule, kind(), min_snr=5.0)(*torch.zeros(2, 4, 1, 1, 1), ends).weight
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_times_are_uniform_or_logit_normal_and_shifted():
    """One uniform number per sample either way, so that nothing else of a step changes."""
    u = (torch.arange(100_000) + 0.5) / 100_000
    assert Objective(FlowSchedule()).times(u) is u
    logits = torch.logit(Objective(FlowSchedule(), logit_normal=(-0.4, 1.3)).times(u).double())
    assert logits.mean() == pytest.approx(-0.4, abs=1e-3) and logits.std() == pytest.approx(1.3, abs=2e-3)
    t = Objective(FlowSchedule(), logit_normal=(-0.4, 1.3), shift=3.0).times(u).double()
    assert torch.logit(t).mean() == pytest.approx(-0.4 + math.log(3), abs=1e-3)  # SD3's shift is one of the logit
    ends = Objective(FlowSchedule(), logit_normal=(0.0, 1.0), shift=3.0).times(torch.tensor([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(ends, [0, 0.75, 1])
    n = Objective(SDSchedule(), logit_normal=(0.0, 1.0))(
        *torch.zeros(2, 3, 1, 1, 1), torch.tensor([0.0, 0.5, 1.0])
    ).time
    assert n.tolist() == [1.0, 501.0, 1000.0]


def test_loss_is_a_mean_over_pixels_then_images_in_fp32():
    output, target = torch.randn(4, 3, 8, 8).bfloat16(), torch.randn(4, 3, 8, 8)
    squares = (output.double() - target.double()) ** 2
    assert mse_loss(output, target).dtype == torch.float32
    torch.testing.assert_close(mse_loss(output, target).double(), squares.mean(), rtol=1e-6, atol=0)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5])  # a sample's, before the mean over the batch
    expected = sum(w * each.mean() for w, each in zip(weight, squares)) / 4
    torch.testing.assert_close(mse_loss(output, target, weight).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_a_step_never_asks_the_device_for_a_value(schedule, prediction):
    """On the meta device any .item() or comparison of values raises."""
    objective = Objective(schedule, prediction, logit_normal=(0.0, 1.0), shift=3.0, min_snr=5.0)
    image, u = torch.empty(2, 1, 4, 4, device="meta"), torch.empty(2, device="meta")
    assert objective.loss(lambda x, t: x, image, image, u).device.type == "meta"
