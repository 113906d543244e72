"""The loop of all samplers: no sync with the device, noise that depends on the sample alone, progress, rehearsals."""

import pytest
import torch

from uvit_fast.diffusion.noise import sample_generators, sample_noise
from uvit_fast.diffusion.samplers import DPMSolverSinglestep, EulerMaruyama
from uvit_fast.diffusion.schedules import VPSchedule

from .exact import ODE, Recorder, gaussian_eps


@pytest.mark.parametrize("solver", [*ODE, EulerMaruyama])
def test_the_loop_never_asks_the_device_for_a_value(solver):
    """On the meta device any .item() or comparison of values raises."""
    sampler = solver(VPSchedule(), 12)
    x = sampler(lambda x, t: x * t.view(-1, 1, 1, 1), torch.empty(2, 1, 4, 4, device="meta"))
    assert x.shape == (2, 1, 4, 4) and x.device.type == "meta"


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
@pytest.mark.parametrize("solver", [*ODE, EulerMaruyama])
def test_a_rehearsal_is_short_and_has_every_kind_of_stage(solver, interval):
    def kinds(sampler):
        return {
            (len(s.update.outputs), bool(s.update.on_x), s.update.noise > 0, s.last, interval[0] <= s.t <= interval[1])
            for s in sampler.stages
        }

    for steps in (1, 2, 3, 50):
        sampler = solver(VPSchedule(), steps)
        short = sampler.rehearsal(interval)
        assert kinds(short) == kinds(sampler) and len(short.stages) <= min(steps, 14) and len(sampler.stages) == steps
        assert torch.isfinite(short(gaussian_eps(VPSchedule()), torch.randn(2, 1, 2, 2))).all()


def test_steps_below_one_are_refused():
    for solver in (*ODE, EulerMaruyama):
        with pytest.raises(ValueError, match="steps: expected at least 1 network evaluation, got 0"):
            solver(VPSchedule(), 0)


def test_a_samples_noise_depends_on_its_index_only():
    together = sample_noise(3, range(6), (1, 4, 4))
    apart = torch.cat([sample_noise(3, [i], (1, 4, 4)) for i in range(6)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, sample_noise(4, range(6), (1, 4, 4)))
    vp, eps = VPSchedule(), gaussian_eps(VPSchedule())
    runs = [EulerMaruyama(vp, 20)(eps, together[rows], sample_generators(5, rows)) for rows in (range(6), range(2, 4))]
    torch.testing.assert_close(runs[0][2:4], runs[1])


def test_progress_is_reported_once_an_evaluation():
    seen = []
    DPMSolverSinglestep(VPSchedule(), 7)(Recorder(), torch.randn(1, 1, 2, 2), callback=lambda *a: seen.append(a))
    assert seen == [(i, 7) for i in range(1, 8)]
