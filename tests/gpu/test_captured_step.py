"""A captured network on a GPU: the gradients of the uncaptured one to the bit, with the fused ops and whatever blocks
keep.
"""

import pytest
import torch

from uvit_fast import build_model, load_config
from uvit_fast.training.captured import Captured
from uvit_fast.training.frozen import freeze

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cores")]


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
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_gradients_are_the_uncaptured_ones(checkpointing):
    net = network(checkpointing)
    expected = gradients(net, 3)
    hooks = [
        p.register_hook(lambda g: g) for p in net.parameters()
    ]  # accumulators made on this stream, as an engine has them
    net.forward = Captured(net)
    found = gradients(net, 3)
    assert net.forward.recorded is not None and hooks
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_in_parts_only_the_order_of_sums_differs(checkpointing):
    expected, net = gradients(network(checkpointing), 3), network(checkpointing)
    net.forward = Captured(net, parts=4)
    found = gradients(net, 3)
    assert len(net.forward.recorded.parts) == 4
    for name, value in expected.items():
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert error < 0.01, f"{name}: {error}"


def waits(output):
    return output + float(output.detach().sum()) * 0


def test_what_waits_for_the_host_runs_uncaptured():
    net = network("none")
    plain = net.forward
    net.forward = lambda *inputs, **conditions: waits(plain(*inputs, **conditions))
    net.forward = Captured(net)
    with pytest.warns(RuntimeWarning, match="training runs uncaptured"):
        refused = gradients(net, 1)
    assert all(torch.equal(refused[name], value) for name, value in gradients(network("none"), 1).items())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("parts", [1, 4])
def test_frozen_weights_get_no_gradients_and_the_others_the_same(checkpointing, parts):
    """What learns lies in the midst,
    behind blocks that nothing leads to and before some that gradients pass through.
    """
    net = network(checkpointing)
    freeze(net, ["out_blocks.1", "out_blocks.4.attn", "norm"])
    expected = gradients(net, 3)
    net.forward = Captured(net, parts=parts)
    found = gradients(net, 3)
    assert net.forward.recorded is not None and len(net.forward.recorded.parts) == {1: 1, 4: 2}[parts]
    assert found.keys() == expected.keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    for name, value in expected.items():
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert error == 0 if parts == 1 else error < 0.01, f"{name}: {error}"
