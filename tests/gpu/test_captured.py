"""A captured network on a GPU: the gradients of the uncaptured one to the bit, with the fused ops and whatever blocks keep."""

import pytest
import torch

from uvit_fast import build_model, load_config
from uvit_fast.training.captured import Captured

pytestmark = pytest.mark.gpu


def network(checkpointing, name="s2_coco"):
    torch.manual_seed(0)
    cfg = load_config(f"configs/{name}.yaml", [f"model.activation_checkpointing={checkpointing}"])
    with torch.device("cuda"):
        return build_model(cfg).to(torch.bfloat16)


def gradients(net, steps):
    g = torch.Generator("cuda").manual_seed(0)
    for _ in range(steps):
        net.zero_grad(set_to_none=True)
        x = torch.randn(6, 4, 32, 32, device="cuda", generator=g)
        t, context = (
            torch.rand(6, device="cuda", generator=g) * 999,
            torch.randn(6, 77, 768, device="cuda", generator=g),
        )
        (net(x, t, context=context) - x).square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("checkpointing, parts", [("none", 1), ("none", 4), ("selective", 3), ("block", 4)])
def test_gradients_are_the_uncaptured_ones(checkpointing, parts):
    expected = gradients(network(checkpointing), 3)
    net = network(checkpointing)
    net.forward = Captured(net, parts)
    found = gradients(net, 3)
    assert len(net.forward.recorded.parts) == parts
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_waits_for_the_host_runs_uncaptured():
    net = network("none")
    hook = net.norm.register_forward_hook(lambda module, args, output: output + float(output.detach().sum()) * 0)
    net.forward = Captured(net)
    with pytest.warns(RuntimeWarning, match="training runs uncaptured"):
        refused = gradients(net, 1)
    hook.remove()
    assert all(torch.equal(refused[name], value) for name, value in gradients(network("none"), 1).items())
