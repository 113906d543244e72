"""Schedulers of diffusers in the place of ours: on data whose score is known, and refused where they do not fit."""

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from tests.diffusion.exact import MEAN, SPREAD, gaussian_eps, gaussian_solution
from tests.diffusion.test_flow import solution
from tests.pipeline.test_pipeline import latent_pipeline, seeded
from uvit_fast.commands.arguments import config_of
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.predictions import Data, Noise, V, Velocity
from uvit_fast.diffusion.schedules import FlowSchedule, SDSchedule, VPSchedule
from uvit_fast.pipeline import UViTPipeline, UViTScheduler, schedulers

SCHEDULES = {"sd": SDSchedule(), "vp": VPSchedule()}
ODE = ["DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"]
ODE += ["KDPM2Discrete", "DEISMultistep", "UniPCMultistep"]
NOISY = ["DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete"]


def like(name, schedule, prediction=None):
    return getattr(diffusers, f"{name}Scheduler").from_config(UViTScheduler(schedule, prediction=prediction).config)


def exact(schedule, prediction):
    """What a network of that prediction says of the Gaussian, from the posterior mean of x_0."""

    def predict(x, time):
        t = float(time[0]) / schedule.network_time(1.0)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        convert = Data().convert(prediction.parts(alpha, sigma), alpha, sigma)
        return convert[0] * x.double() + convert[1] * (MEAN + gain * (x.double() - alpha * MEAN))

    return predict


def test_all_that_are_taken_are_tried_here():
    assert {f"{name}Scheduler" for name in ODE + NOISY} == set(schedulers.OTHERS) - {
        "DPMSolverSDEScheduler"
    }  # torchsde


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ODE)
def test_each_solves_the_gaussian(name, schedule):
    """To data without noise, where ours ends at t_min: the standard deviations differ by less than the tolerance."""
    ours, scheduler = SCHEDULES[schedule], like(name, schedule)
    schedulers.check(scheduler, schedule, latent=True)
    x_T = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    got = schedulers.solve(scheduler, schedule, 100, gaussian_eps(ours), x_T)
    assert (got - gaussian_solution(ours, x_T)).abs().max() < 0.05


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("prediction", "kind"), [("velocity", Velocity()), ("eps", Noise()), ("x0", Data())])
@pytest.mark.parametrize("name", [name.removesuffix("Scheduler") for name in schedulers.FLOWS])
def test_those_of_flows_solve_the_gaussian_whatever_the_network_predicts(name, prediction, kind, shift):
    flow = FlowSchedule()
    config = UViTScheduler("flow", sampler="heun", prediction=prediction, shift=shift).config
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    schedulers.check(scheduler, "flow", latent=True, prediction=prediction)
    x_T = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    got = schedulers.solve(scheduler, "flow", 100, exact(flow, kind), x_T, prediction=prediction)
    assert (got - solution(0.999, 0.0, x_T)).abs().max() < 0.05


def test_networks_in_sits_terms_run_on_them_too():
    x_T, velocity = torch.randn(3, 1, 2, 2, generator=seeded()), exact(FlowSchedule(), Velocity())
    ours, sit = (
        schedulers.solve(like("FlowMatchEulerDiscrete", name), name, 5, predict, x_T, prediction="velocity")
        for name, predict in (("flow", velocity), ("flow_sit", lambda x, t: -velocity(x, 1000 * (1 - t))))
    )
    torch.testing.assert_close(ours, sit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prediction", "kind"), [("v", V()), ("x0", Data())])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_predictions_are_named_in_their_terms_and_solved(schedule, prediction, kind):
    ours, scheduler = SCHEDULES[schedule], like("DPMSolverMultistep", schedule, prediction)
    assert scheduler.config.prediction_type == {"v": "v_prediction", "x0": "sample"}[prediction]
    schedulers.check(scheduler, schedule, latent=True, prediction=prediction)
    x_T = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    got = schedulers.solve(scheduler, schedule, 60, exact(ours, kind), x_T, prediction=prediction)
    assert (got - gaussian_solution(ours, x_T)).abs().max() < 0.05
    with pytest.raises(ValueError, match=r"expected DDIMScheduler.from_config\(UViTScheduler\('.d|p', prediction="):
        schedulers.check(like("DDIM", schedule), schedule, latent=True, prediction=prediction)


def test_a_scheduler_that_does_not_know_the_prediction_is_named():
    scheduler, x_T = like("PNDM", "sd", "x0"), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="PNDMScheduler does not know prediction_type sample"):
        schedulers.solve(scheduler, "sd", 3, lambda x, t: x, x_T, prediction="x0")


@pytest.mark.parametrize("name", NOISY)
def test_those_that_draw_noise_give_the_gaussians_mean_and_spread(name):
    x_T = torch.randn(4000, 1, 1, 1, generator=seeded())
    x = schedulers.solve(like(name, "sd"), "sd", 100, gaussian_eps(SCHEDULES["sd"]), x_T, seeded(1))
    assert abs(x.mean() - 1.5) < 0.05 and abs(x.std() - 0.5) < 0.05


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_network_is_told_the_time_of_its_own_level(schedule):
    """diffusers counts from 0: its level n is SD's n + 1; VP is continuous."""
    seen = []

    def eps_fn(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    scheduler = like("DDIM", schedule)
    schedulers.solve(scheduler, schedule, 10, eps_fn, torch.zeros(2, 1, 2, 2))
    assert all(t.shape == (2,) and t.dtype == torch.float32 for t in seen)
    ours, times = SCHEDULES[schedule], np.array([t[0].item() for t in seen])
    if schedule == "sd":
        np.testing.assert_allclose(times, scheduler.timesteps.numpy() + 1, rtol=1e-5)
    assert times[0] == pytest.approx(ours.network_time(1.0))  # the discretisation of VP ends a little beyond it
    levels = scheduler.alphas_cumprod[scheduler.timesteps[1:]].sqrt()
    np.testing.assert_allclose(ours.alpha(times[1:] / ours.network_time(1.0)), levels, rtol=1e-4)


def test_guidance_and_its_interval_are_kept():
    """Where all times are inside, s (cond - uncond) more; outside, the conditional branch alone."""

    class Net(nn.Module):
        def forward(self, x, t, y):
            return 0.1 * x + y.view(-1, 1, 1, 1)

    x_T, y, null = torch.randn(2, 1, 4, 4), torch.tensor([1.0, 2.0]), {"y": torch.tensor(0.0)}

    def run(scale, interval=(0.0, 1.0)):
        return schedulers.solve(like("DDIM", "sd"), "sd", 5, Guidance(Net(), {"y": y}, null, scale, interval), x_T)

    plain = schedulers.solve(like("DDIM", "sd"), "sd", 5, lambda x, t: Net()(x, t, 1.5 * y), x_T)
    torch.testing.assert_close(run(0.5), plain)
    torch.testing.assert_close(run(0.5, (0.0, 0.0)), run(0.0))
    assert not torch.allclose(run(0.5, (0.5, 1.0)), plain)


def test_a_pipeline_takes_another_scheduler_keeps_it_and_takes_ours_again(tmp_path):
    pipe = latent_pipeline()
    before = pipe([3], generator=seeded(), output_type="latent").images
    ours, seen = pipe.scheduler, []
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    images = pipe([3], num_inference_steps=6, generator=seeded(), output_type="latent", eta=0.5).images
    pipe.save_pretrained(tmp_path)
    again = UViTPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDIMScheduler
    again.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 6, "output_type": "latent", "eta": 0.5, "callback": lambda *n: seen.append(n)}
    assert torch.equal(again([3], generator=seeded(), **call).images, images)
    assert seen == [(i, 6) for i in range(1, 7)]
    again.enable_cuda_graphs()  # what it could not record it does not try to
    again([3], num_inference_steps=2, output_type="latent")
    again.scheduler = UViTScheduler.from_config(again.scheduler.config)
    assert again.scheduler.config.sampler == ours.config.sampler
    again._graphs = None
    assert torch.equal(again([3], generator=seeded(), output_type="latent").images, before)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            lambda: diffusers.DDIMScheduler(),
            "DDIMScheduler with beta_start 0.0001, where the model has 0.00085; expected DDIMSch",
        ),
        (lambda: diffusers.DDIMScheduler(**{**schedulers.LEVELS["sd"], "clip_sample": True}), "clip_sample True"),
        (lambda: diffusers.DDIMScheduler.from_config(UViTScheduler().config, prediction_type="v_prediction"), "v_pred"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler solves another process"),
        (lambda: diffusers.EDMEulerScheduler(), "EDMEulerScheduler solves another process"),
    ],
)
def test_a_scheduler_of_other_formulas_is_named(scheduler, words):
    pipe = latent_pipeline()
    pipe.scheduler = scheduler()
    with pytest.raises(ValueError, match=words):
        pipe([3])


def test_a_flow_refuses_schedulers_of_other_processes():
    pipe = latent_pipeline("h2_256", "diffusion.schedule=flow", "sample.sampler=heun")
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler solves another process .* FlowMatchEulerDiscreteScheduler"):
        pipe([3])
    pipe.scheduler = diffusers.UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="expected UniPCMultistepScheduler.from_config\\(UViTScheduler\\('flow'\\)"):
        pipe([3])
    with pytest.raises(ValueError, match="Euler solves the ODE of a flow"):
        UViTScheduler("sd", sampler="euler")


def test_a_flows_pipeline_keeps_its_prediction_and_shift(tmp_path):
    """In the folder's files, also with a scheduler of diffusers in the place of ours; `convert` and `sample` read them
    there.
    """
    pipe = latent_pipeline("h2_256", "diffusion.schedule=flow", "sample.sampler=heun", "sample.shift=3.0")
    call = {"num_inference_steps": 5, "output_type": "latent"}
    ours = pipe([3], generator=seeded(), **call).images
    pipe.save_pretrained(tmp_path / "ours")
    again = UViTPipeline.from_pretrained(tmp_path / "ours")
    assert torch.equal(again([3], generator=seeded(), **call).images, ours)
    cfg = config_of(None, str(tmp_path / "ours"), [])
    assert (cfg.diffusion.schedule, cfg.diffusion.prediction) == ("flow", "velocity")
    assert (cfg.sample.sampler, cfg.sample.shift) == ("heun", 3.0)
    again.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(again.scheduler.config)
    assert again.scheduler.config.shift == 3.0
    images = again([3], generator=seeded(), **call).images
    again.save_pretrained(tmp_path / "theirs")
    third = UViTPipeline.from_pretrained(tmp_path / "theirs")
    assert torch.equal(third([3], generator=seeded(), **call).images, images)
    assert "the velocity" in (tmp_path / "ours" / "README.md").read_text()
    third.scheduler = UViTScheduler.from_config(third.scheduler.config)
    assert torch.equal(third([3], generator=seeded(), **call).images, ours)


def test_ours_is_no_step_by_step_scheduler_and_says_what_is():
    for call in (lambda s: s.set_timesteps(50), lambda s: s.step(torch.zeros(1), 3, torch.zeros(1))):
        with pytest.raises(NotImplementedError, match="DDIMScheduler.from_config"):
            call(UViTScheduler())


def test_their_configs_pass_ours_on_without_a_word(caplog):
    with caplog.at_level("WARNING", logger="diffusers"):
        config = UViTScheduler(schedule="vp", sampler="dpm_fast", steps=7).config
        for name in ("DDIM", "PNDM", "EulerDiscrete"):
            config = getattr(diffusers, f"{name}Scheduler").from_config(config).config
        assert UViTScheduler.from_config(config).config.steps == 7
        config = UViTScheduler(schedule="flow", sampler="heun", shift=2.0).config
        for name in ("FlowMatchEulerDiscrete", "UniPCMultistep", "FlowMatchHeunDiscrete"):
            config = getattr(diffusers, f"{name}Scheduler").from_config(config).config
        assert UViTScheduler.from_config(config).config.shift == 2.0
    assert not caplog.records


def test_eta_is_ddims_alone():
    pipe = latent_pipeline()
    with pytest.raises(ValueError, match="eta: UViTScheduler takes none"):
        pipe([3], eta=0.5)
    pipe.scheduler = like("UniPCMultistep", "sd")
    with pytest.raises(ValueError, match="eta: UniPCMultistepScheduler takes none"):
        pipe([3], eta=0.5)
