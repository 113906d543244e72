"""Guidance is the paper's formula, in one call of the network."""

import pytest
import torch

from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.samplers import DPMSolverPPMultistep
from uvit_fast.diffusion.schedules import SDSchedule


class Network:
    """eps depends on x, t and the condition; keeps the batch sizes of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y=None, context=None):
        self.calls.append(len(x))
        condition = y.float() if context is None else context.mean((1, 2))
        return x * (condition + t).view(-1, 1, 1, 1)


X, T = torch.randn(3, 1, 2, 2), torch.full((3,), 0.5)


def test_both_branches_are_one_call_of_twice_the_batch():
    network, y = Network(), torch.tensor([0, 1, 2])
    eps = Guidance(network, {"y": y}, {"y": 9}, 0.4)(X, T)
    cond, uncond = Network()(X, T, y=y), Network()(X, T, y=torch.tensor([9, 9, 9]))
    assert network.calls == [6]
    torch.testing.assert_close(eps, cond + 0.4 * (cond - uncond))
    torch.testing.assert_close(eps, uncond + 1.4 * (cond - uncond))  # the convention of DiT and diffusers


def test_the_null_of_text_is_shared_by_the_batch():
    network, context, null = Network(), torch.randn(3, 5, 2), torch.randn(5, 2)
    eps = Guidance(network, {"context": context}, {"context": null}, 1.0)(X, T)
    cond, uncond = (Network()(X, T, context=c) for c in (context, null.expand(3, 5, 2)))
    torch.testing.assert_close(eps, 2 * cond - uncond)


def test_the_combination_is_fp32_whatever_the_network_writes():
    guided = Guidance(lambda x, t, y: x.bfloat16(), {"y": torch.tensor([0, 1, 2])}, {"y": 9}, 0.4)
    assert guided(X, T).dtype == torch.float32
    torch.testing.assert_close(guided(X, T), X.bfloat16().float(), rtol=1e-6, atol=1e-6)


def test_a_sampler_combines_as_the_guidance_does():
    """Its update takes the two branches; a plain function of the combined eps gives the same samples."""
    sampler = DPMSolverPPMultistep(SDSchedule(), 6)
    guided = Guidance(Network(), {"y": torch.tensor([0, 1, 2])}, {"y": 9}, 0.4)
    torch.testing.assert_close(sampler(guided, X), sampler(lambda x, t: guided(x, t), X))


def test_guidance_without_a_condition_or_its_null_is_refused():
    with pytest.raises(ValueError, match="expected a condition"):
        Guidance(Network(), {}, {}, 0.4)
    with pytest.raises(ValueError, match="expected a null value for y, got none"):
        Guidance(Network(), {"y": torch.tensor([0])}, {"y": None}, 0.4)
    with pytest.raises(ValueError, match=r"expected 0 <= first <= last <= 1, got \(0.2, 1.5\)"):
        Guidance(Network(), {"y": torch.tensor([0])}, {"y": 9}, 0.4, interval=(0.2, 1.5))
