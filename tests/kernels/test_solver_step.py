"""The fused solver update is the reference's, guidance, data prediction, history and noise included."""

import numpy as np
import pytest
import torch

from uvit_fast.kernels.ops.solver_step import Update, normal, reference, solver_step, why_not

NOISE, DATA = (0.0, 1.0), (1.7, -0.4)
UPDATES = [
    (NOISE, 0.0, (0.3,)),  # order 1
    (NOISE, 0.0, (0.3, -0.7)),  # order 2
    (DATA, 0.0, (0.3, -0.7, 0.2)),  # as many outputs as fit
    (DATA, 0.0, (-0.7,)),
    (NOISE, 0.6, (0.3,)),  # Euler-Maruyama
]


@pytest.mark.interpreter
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("update", [Update(*prediction, 0.9, noise, w) for prediction, noise, w in UPDATES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_the_reference(update, guided, dtype):
    """Three samples of 515 numbers: neither the block nor a sample divides the whole."""
    torch.manual_seed(0)
    x, start, *history = torch.randn(1 + len(update.outputs), 3, 5, 103)
    eps = torch.randn(6 if guided else 3, 5, 103).to(dtype)
    scale = torch.tensor(0.4) if guided else None
    keys = torch.tensor([1, -(2**62), 2**40 + 3])
    arguments = eps, x, start, history, scale, keys, 17
    expected, m = reference(update, *arguments)
    row = torch.tensor(update.row())
    for keep in (True, False):
        got, got_m = solver_step(update, row, *arguments, keep=keep)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
        assert got_m is None if not keep else torch.allclose(got_m, m, rtol=1e-6, atol=1e-6)


@pytest.mark.interpreter
def test_numbers_come_from_the_table():
    """Another row and another scale in the same memory give another state: a captured graph can be retuned."""
    update, other = Update(0.0, 1.0, 0.9, 0.0, (0.3,)), Update(0.0, 1.0, 0.5, 0.0, (-1.0,))
    x, eps = torch.randn(2, 8), torch.randn(4, 8)
    row, scale = torch.tensor(update.row()), torch.tensor(0.4)
    row.copy_(torch.tensor(other.row()))
    scale.fill_(2.0)
    got, _ = solver_step(update, row, eps, x, x, scale=scale)
    torch.testing.assert_close(got, reference(other, eps, x, x, scale=torch.tensor(2.0))[0])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "schedule", "prediction"),
    [
        ("DPMSolverSinglestep", "VPSchedule", "Noise"),
        ("DPMSolverPPMultistep", "VPSchedule", "Noise"),
        ("EulerMaruyama", "VPSchedule", "V"),
        ("Heun", "FlowSchedule", "Velocity"),
        ("DPMSolverSinglestep", "FlowSchedule", "Velocity"),
    ],
)
def test_a_sampler_runs_on_the_fused_update(name, schedule, prediction):
    from uvit_fast.diffusion import predictions, samplers, schedules

    prediction = getattr(predictions, prediction)()
    sampler = getattr(samplers, name)(getattr(schedules, schedule)(), 5, prediction=prediction)
    x_T, keys = torch.randn(2, 1, 4, 4), torch.tensor([5, 6])

    def eps_fn(x, t):
        return torch.tanh(x) * t.view(-1, 1, 1, 1) / 999

    fused = sampler(eps_fn, x_T, keys)
    learnable = torch.ones((), requires_grad=True)  # what needs a gradient takes the reference
    plain = sampler(lambda x, t: learnable * eps_fn(x, t), x_T, keys)
    torch.testing.assert_close(fused, plain.detach(), rtol=1e-5, atol=1e-5)
    plain.sum().backward()
    assert learnable.grad.isfinite()


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_compiles_without_spills(arch):
    from uvit_fast.kernels.ops.solver_step import _kernel
    from uvit_fast.kernels.tools import aot

    f, b, k = (torch.empty(64, dtype=d, device="meta") for d in (torch.float32, torch.bfloat16, torch.int64))
    everything = {"GUIDED": True, "DATA": True, "PAST": 2, "NOISE": True, "KEEP": True, "BLOCK": 1024, "num_warps": 4}
    report = aot.compile(_kernel, f, f, b, f, f, f, f, f, f, k, 3, 8192, 4096, arch=arch, **everything)
    assert report["spilled"] == 0 and report["registers"] <= 128


def test_philox_is_the_published_one():
    """Random123's known answers of philox4x32-10 for the counter and key of zeros, through the Box-Muller step."""
    u, v = (((c >> 8) * 2**-24 + 2**-25) for c in (0x6627E8D5, 0xE169C58D))
    expected = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    assert normal(torch.tensor([0]), 0, 1).item() == pytest.approx(expected, rel=1e-5)


def test_noise_is_normal_and_differs_by_key_step_and_place():
    """Mean, variance and kurtosis of 400,000 draws are within five standard deviations; no two streams correlate."""
    z = normal(torch.tensor([3, 4, 3 + 2**32, -1]), 7, 100_000).double()
    assert (
        abs(z.mean()) < 5 / 632 and abs(z.var() - 1) < 5 * 2**0.5 / 632 and abs((z**4).mean() - 3) < 5 * 96**0.5 / 632
    )
    streams = torch.cat([z, normal(torch.tensor([3]), 8, 100_000).double()])
    correlation = torch.corrcoef(streams) - torch.eye(5)
    assert correlation.abs().max() < 5 / 316
    assert torch.equal(normal(torch.tensor([4]), 7, 100)[0], z[1, :100].float())


def test_why_not_names_the_objection():
    assert why_not(torch.empty(2, 3, device="meta")) == "the state is on meta; the fused update runs on CUDA"
    assert "CUDA" in why_not(torch.empty(2, 3))


@pytest.mark.interpreter
def test_two_branches_are_asked_for_where_there_is_a_scale():
    x = torch.randn(2, 8)
    update = Update(0.0, 1.0, 0.9, 0.0, (0.3,))
    with pytest.raises(ValueError, match=r"expected 2 x \(2, 8\) values of eps, got \(2, 8\)"):
        solver_step(update, torch.tensor(update.row()), x, x, x, scale=torch.tensor(0.4))
