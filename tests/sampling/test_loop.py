"""The sampling loop: what it asks the network, and how often."""

import torch
from torch import nn

from uvit_fast import load_config, sampling


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
