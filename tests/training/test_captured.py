"""A captured network trains as the plain one does, bit for bit; on a stand-in for CUDA graphs."""

import warnings

import pytest
import torch

from tests.recorded import RecordedGraphs
from uvit_fast.model.uvit import UViT
from uvit_fast.training.captured import Captured

WAYS = {"plain": {}, "add": {"skip": "add"}, "none": {"skip": "none"}, "block": {"activation_checkpointing": "block"}}


def network(**changes):
    torch.manual_seed(0)
    size = {
        "img_size": 8,
        "in_chans": 3,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 5,
    }
    return UViT(**{**size, "kernels": "reference", "attention": "math", **changes})


def batch(seed, size=3):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, 8, 8, generator=g),
        torch.rand(size, generator=g) * 999,
        torch.randint(5, (size,), generator=g),
    )


def train(net, steps=3, micro_batches=1):
    """Losses and the last gradients of SGD with labels by name."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for k in range(micro_batches):
            x, t, y = batch(step * micro_batches + k)
            loss = (net(x, t, y=y) - x).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def captured(net, **how):
    graphs = RecordedGraphs()
    net.forward = Captured(net, graphs=graphs, **how)
    return net, graphs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_losses_and_gradients_are_the_plain_ones(way, parts):
    """Seven blocks: with three parts skips cross one border and two, with seven every block is one; sums of three terms
    then have another order."""
    net, graphs = captured(network(**WAYS[way]), parts=parts)
    net.pos_embed.register_post_accumulate_grad_hook(lambda p: None)  # as an engine's
    losses, gradients = train(net)
    expected, expected_gradients = train(network(**WAYS[way]))
    assert gradients.keys() == expected_gradients.keys() and graphs.captures == 1 + parts
    if parts == 1:
        assert losses == expected
    rounding = {"rtol": 0, "atol": 0} if parts == 1 else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(gradients, expected_gradients, **rounding)


@pytest.mark.parametrize(
    "learns", ["label_emb", "norm.", "mid_block", "out_blocks.1.attn", "in_blocks.0.norm1 out_blocks.2"]
)
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_frozen_weights_get_no_gradients(learns, parts):
    """What learns may lie before, within or behind a border of parts, which the long skips cross, or on both sides."""
    nets = [network() for _ in range(2)]
    for net in nets:
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith(tuple(learns.split())))
    net, graphs = captured(nets[1], parts=parts)
    losses, gradients = train(net)
    expected, expected_gradients = train(nets[0])
    assert gradients.keys() == expected_gradients.keys() == {n for n, p in net.named_parameters() if p.requires_grad}
    assert 2 <= graphs.captures <= 1 + parts and losses == pytest.approx(expected)
    assert learns != "norm." or graphs.captures == 2  # the last part alone
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-7)


def test_gradients_accumulate_where_they_are_kept():
    net, _ = captured(network(), keep_gradients=True)
    assert train(net, micro_batches=2)[0] == train(network(), micro_batches=2)[0]


def test_each_part_hands_over_its_gradients_before_the_next_one_runs():
    net, _ = captured(network(), parts=7)
    x, t, y = batch(0)
    net(x, t, y=y)
    recorded, log = net.forward.recorded, []
    parts = [part._replace(replay=noting(part.replay, log, f"part {k}")) for k, part in enumerate(recorded.parts)]
    net.forward.recorded = recorded._replace(parts=parts)
    for k, block in enumerate(net.blocks):
        block.attn.proj.weight.register_post_accumulate_grad_hook(lambda p, k=k: log.append(f"gradient {k}"))
    net(x, t, y=y).square().mean().backward()
    assert log == [f"{what} {k}" for k in reversed(range(7)) for what in ("part", "gradient")]


def noting(function, log, what):
    def noted():
        log.append(what)
        function()

    return noted


def test_another_shape_and_moved_weights_are_captured_anew():
    net, graphs = captured(network())
    for size in (3, 3, 2):
        x, t, y = batch(0, size)
        assert torch.equal(net(x, t, y=y), network()(x, t, y=y))
    assert graphs.captures == 4
    net.pos_embed.data = net.pos_embed.data + 1
    other = network()
    other.pos_embed.data += 1
    assert torch.equal(net(x, t, y=y), other(x, t, y=y)) and graphs.captures == 6


def test_an_output_survives_the_next_call_and_its_backward_does_not():
    net, _ = captured(network())
    first = net(*batch(0))
    before = first.detach().clone()
    net(*batch(1))
    assert torch.equal(first, before)
    with pytest.raises(RuntimeError, match="before the next forward"):
        first.sum().backward()


def test_a_second_backward_of_a_forward_is_refused():
    net, _ = captured(network())
    loss = net(*batch(0)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward of a forward"):
        loss.backward()


def waits(output):
    return output + float(output.detach().sum()) * 0


def test_what_cannot_be_captured_runs_uncaptured_after_one_warning():
    net, plain = network(), UViT.forward
    net.forward = lambda *inputs, **conditions: waits(plain(net, *inputs, **conditions))
    net, _ = captured(net)
    with pytest.warns(RuntimeWarning, match="training runs uncaptured: the host reads a value"):
        losses = train(net, steps=1)[0]
    assert all(type(p) is torch.nn.Parameter and p.grad is not None for p in net.parameters())  # the old ones again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(net, steps=2)[0][0] < losses[0]  # it has learned, and goes on


def test_a_network_with_hooks_runs_uncaptured_and_later_ones_are_refused():
    """A replay would run the hook never again."""
    net, graphs = captured(network())
    seen = []
    hook = net.mid_block.attn.qkv.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(RuntimeWarning, match="training runs uncaptured: mid_block.attn.qkv has hooks"):
        train(net)
    assert len(seen) == 3 and graphs.captures == 0
    hook.remove()
    net, _ = captured(network())
    train(net)
    net.mid_block.attn.qkv.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match="mid_block.attn.qkv has hooks.*expected changes before the first step"):
        train(net)


def test_ranks_replay_together_or_not_at_all():
    """Where another rank runs out of memory, say."""
    asked = []
    net, graphs = captured(network(), parts=3, agree=lambda fine: asked.append(fine))
    with pytest.warns(RuntimeWarning, match="cannot be captured on another rank"):
        losses = train(net)[0]
    assert asked == [True] and graphs.captures == 4 and net.forward.recorded is None
    assert losses == train(network())[0]


def test_without_gradients_the_network_runs_as_it_is():
    net, graphs = captured(network())
    with torch.no_grad():
        net(*batch(0))
    assert graphs.captures == 0
