"""The sampling loop: what it asks the network, and how often."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from uvit_fast import load_config, sampling
from uvit_fast.build import build_sampler


class Net(nn.Module):
    """Keeps the batch sizes of its calls."""

    def __init__(self):
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.ones(())), []

    def forward(self, x, t, y):
        self.rows.append(len(x))
        return self.weight * x


def test_a_scale_of_zero_costs_one_branch():
    cfg, net = load_config("configs/digits.yaml"), Net()
    for scale in (0.0, 0.4):
        list(sampling.sample(net, cfg, 3, labels=torch.arange(3), steps=2, guidance_scale=scale))
    assert net.rows == [3, 3, 6, 6]


def test_a_sample_is_the_same_in_any_batch():
    """Batches one after another, any ranges of them, and one alone: noise and labels go with the sample's index."""
    cfg, net, labels = load_config("configs/digits.yaml"), Net(), torch.arange(6) % 10

    def draw(**how):
        return list(sampling.sample(net, cfg, 6, labels=labels, steps=2, guidance_scale=0.4, **how))

    (whole,) = draw(batch=6)
    assert torch.equal(torch.cat(draw(batch=4)), whole)
    apart = draw(parts=[range(1, 2), range(3, 6)])
    assert torch.equal(torch.cat(apart), whole[[1, 3, 4, 5]])
    assert torch.equal(torch.cat(draw(first=4, batch=1)), whole[4:])


def test_a_request_like_an_earlier_one_plans_nothing():
    """Planning 50 evaluations takes as long as some of them."""
    cfg, again = (load_config("configs/digits.yaml", ["sample.steps=7"]) for _ in range(2))
    assert build_sampler(cfg) is build_sampler(again)
    assert build_sampler(cfg, 8) is not build_sampler(cfg)


def test_what_one_request_does_with_its_sampler_the_next_does_not_meet():
    """They may share it: neither its plan nor its tables are then another's."""
    cfg = load_config("configs/digits.yaml", ["sample.steps=6"])
    with FakeTensorMode():
        build_sampler(cfg)(lambda x, t: x * t.view(-1, 1, 1, 1), torch.ones(1, 1, 2, 2))
    with pytest.raises(AttributeError):
        build_sampler(cfg).stages = build_sampler(cfg).stages[1:]
    assert build_sampler(cfg)(lambda x, t: x * t.view(-1, 1, 1, 1), torch.ones(1, 1, 2, 2)).isfinite().all()
