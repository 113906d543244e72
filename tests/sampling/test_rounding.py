"""Weights in e4m3 are rounded for the samples that the network itself draws."""

import torch

from tests.model.test_fp8 import network
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model import fp8
from uvit_fast.sampling import rounding


def weights(net: fp8.Fp8UViT) -> list[torch.Tensor]:
    return [layer.weight.float() for layers in net.layers for layer in layers if layer is not None]


def test_every_process_rounds_alike(monkeypatch):
    """As those do that share a job's samples."""
    monkeypatch.setattr(rounding, "IMAGES", 4)
    monkeypatch.setattr(rounding, "EVALUATIONS", 4)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = fp8.Fp8UViT(network(), fp8_block.REFERENCE, ())
        alone = weights(net)
        rounding.calibrate(net, "flow", "velocity")
        assert not any(map(torch.equal, alone, weights(net)))
        found.append(weights(net))
    assert all(map(torch.equal, *found))


def test_networks_of_text_stay_as_they_are():
    net = fp8.Fp8UViT(network(num_classes=0, context_dim=16, context_tokens=5), fp8_block.REFERENCE)
    before = weights(net)
    rounding.calibrate(net, "sd", "eps")
    assert all(map(torch.equal, before, weights(net)))
