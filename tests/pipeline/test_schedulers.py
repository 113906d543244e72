"""Schedulers of diffusers in the place of ours: on data whose score is known, and refused where they do not fit."""

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from tests.diffusion.test_samplers import gaussian_eps, gaussian_solution
from tests.pipeline.test_pipeline import latent_pipeline, seeded
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.schedules import SDSchedule, VPSchedule
from uvit_fast.pipeline import UViTPipeline, UViTScheduler, schedulers

SCHEDULES = {"sd": SDSchedule(), "vp": VPSchedule()}
ODE = ["DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"]
ODE += ["KDPM2Discrete", "DEISMultistep", "UniPCMultistep"]
NOISY = ["DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete"]


def like(name, schedule):
    return getattr(diffusers, f"{name}Scheduler").from_config(UViTScheduler(schedule).config)


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
    assert not caplog.records


def test_eta_is_ddims_alone():
    pipe = latent_pipeline()
    with pytest.raises(ValueError, match="eta: UViTScheduler takes none"):
        pipe([3], eta=0.5)
    pipe.scheduler = like("UniPCMultistep", "sd")
    with pytest.raises(ValueError, match="eta: UniPCMultistepScheduler takes none"):
        pipe([3], eta=0.5)
