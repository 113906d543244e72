"""Captured sampling gives what the plain loop gives, whatever changes between two calls;
on a stand-in for CUDA graphs.
"""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from tests.recorded import RecordedGraphs
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.noise import sample_generators
from uvit_fast.diffusion.predictions import Velocity
from uvit_fast.diffusion.samplers import (
    DPMSolverPPMultistep,
    DPMSolverPPSinglestep,
    DPMSolverSinglestep,
    EulerMaruyama,
    Heun,
)
from uvit_fast.diffusion.schedules import FlowSchedule, SDSchedule, VPSchedule
from uvit_fast.runtime.hooks import changed
from uvit_fast.sampling import captured
from uvit_fast.sampling.captured import GraphSampler

NULL = 10


class Net(nn.Module):
    """A conditional network of elementwise operations: row i of a batch has the same bits in any batch."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(NULL + 1, 3)
        self.rows = []  # batch sizes that it was called with

    def forward(self, x, t, y=None, context=None):
        self.rows.append(len(x))
        shift = self.label(y) if context is None else context.mean(1)  # (B, 3)
        return torch.tanh(x * (1 + t / 1000).view(-1, 1, 1, 1)) + shift[:, :, None, None]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def batch(size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 4, 4, generator=g), torch.randint(NULL, (size,), generator=g)


@torch.no_grad()
def plain(net, sampler, x_T, y, scale=0.0, interval=(0.0, 1.0), keys=None):
    eps_fn = Guidance(net, {"y": y}, {"y": NULL}, scale, interval) if scale else partial(net, y=y)
    return sampler(eps_fn, x_T, keys)


SAMPLERS = [
    DPMSolverSinglestep(VPSchedule(), 8),
    DPMSolverPPSinglestep(SDSchedule(), 8),
    DPMSolverPPMultistep(SDSchedule(), 5),
    EulerMaruyama(VPSchedule(), 6),
    Heun(FlowSchedule(), 7, prediction=Velocity()),
    DPMSolverPPMultistep(FlowSchedule(), 5, prediction=Velocity()),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("guided", [False, True])
def test_replays_are_the_plain_loop_bit_for_bit(net, sampler, guided):
    """New noise, labels, scale and keys: one capture serves them all."""
    graphs = RecordedGraphs()
    sample = GraphSampler(net, graphs=graphs)
    for seed in range(3):
        (x_T, y), scale, keys = batch(4, seed), guided * (0.4 + seed), sample_generators(seed, range(4))
        got = sample(sampler, x_T, {"y": y}, {"y": NULL}, scale, keys=keys)
        assert torch.equal(got, plain(net, sampler, x_T, y, scale, keys=keys))
    assert graphs.captures == 1


def test_a_model_with_hooks_or_adapters_runs_uncaptured_while_it_has_them(net):
    """A replay would not call them, nor see an adapter's scale change."""
    graphs, (x_T, y), calls = RecordedGraphs(), batch(2), []
    sample = GraphSampler(net, graphs=graphs)
    sample(SAMPLERS[2], x_T, {"y": y})
    hook = net.label.register_forward_hook(lambda module, args, out: calls.append(1) or out + 1)
    with pytest.warns(RuntimeWarning, match="uncaptured: label has hooks"):
        got = sample(SAMPLERS[2], x_T, {"y": y})
    assert torch.equal(got, plain(net, SAMPLERS[2], x_T, y)) and len(calls) == 10
    hook.remove()
    assert torch.equal(sample(SAMPLERS[2], x_T, {"y": y}), plain(net, SAMPLERS[2], x_T, y)) and graphs.captures == 1
    whole = net.register_forward_hook(lambda module, args, out: out + 1)
    with pytest.warns(RuntimeWarning, match="uncaptured: the network has hooks"):
        assert torch.equal(sample(SAMPLERS[2], x_T, {"y": y}), plain(net, SAMPLERS[2], x_T, y))
    whole.remove()
    adapter = type("Adapter", (nn.Embedding,), {"__module__": "peft.somewhere"})
    net.label = adapter(NULL + 1, 3)
    with pytest.warns(RuntimeWarning, match="uncaptured: label is a peft.somewhere.Adapter"):
        sample(SAMPLERS[2], x_T, {"y": y})


def test_a_replay_compares_the_model_and_looks_through_it_only_after_a_change(net, monkeypatch):
    """Looking through H/2 takes half a millisecond, in which the GPU would wait."""
    looked = []
    monkeypatch.setattr(captured, "changed", lambda model: looked.append(model) or changed(model))
    graphs, (x_T, y) = RecordedGraphs(), batch(2)
    sample = GraphSampler(net, graphs=graphs)
    for change, expected in ((None, 1), (net.eval, 1), (net.train, 1), (lambda: setattr(net.label, "note", 1), 2)):
        if change:
            change()
        for _ in range(2):
            sample(SAMPLERS[0], x_T, {"y": y})
        assert len(looked) == expected
    assert graphs.captures == 1


def test_text_features_and_their_null_are_inputs(net):
    graphs, sampler = RecordedGraphs(), SAMPLERS[1]
    sample = GraphSampler(net, graphs=graphs)
    for seed in range(2):
        x_T, _ = batch(2, seed)
        context, null = torch.randn(2, 5, 3), torch.randn(5, 3)
        with torch.no_grad():
            expected = sampler(Guidance(net, {"context": context}, {"context": null}, 1.0), x_T)
        assert torch.equal(sample(sampler, x_T, {"context": context}, {"context": null}, 1.0), expected)
    assert graphs.captures == 1


def test_a_capture_costs_a_few_evaluations_more_and_can_be_made_beforehand(net):
    """A rehearsal has every kind of stage of a thousand steps: with noise and without, guided and not."""
    graphs, sampler, (x_T, y), keys = RecordedGraphs(), EulerMaruyama(VPSchedule(), 200), batch(2), torch.tensor([1, 2])
    sample, arguments = GraphSampler(net, graphs=graphs), (sampler, x_T, {"y": y}, {"y": NULL}, 0.4, (0.0, 0.5))
    assert sample.prepare(*arguments, keys=keys) and graphs.captures == 1
    assert 200 < len(net.rows) <= 208 and set(net.rows[:-200]) == {2, 4}
    net.rows.clear()
    got = sample(*arguments, keys=keys)
    assert graphs.captures == 1 and not net.rows
    assert torch.equal(got, plain(net, sampler, x_T, y, 0.4, (0.0, 0.5), keys))
    unable = GraphSampler(lambda x, t: x * float(t[0]), graphs=graphs)
    with pytest.warns(RuntimeWarning, match="uncaptured"):
        assert not unable.prepare(SAMPLERS[0], x_T)


def test_a_smaller_batch_is_padded_and_a_larger_one_captured(net):
    graphs, sampler = RecordedGraphs(), SAMPLERS[0]
    sample = GraphSampler(net, graphs=graphs)
    for size, captures in [(4, 1), (1, 1), (3, 1), (6, 2), (5, 2), (4, 2)]:
        x_T, y = batch(size, size)
        got = sample(sampler, x_T, {"y": y}, {"y": NULL}, 0.4)
        assert torch.equal(got, plain(net, sampler, x_T, y, 0.4))
        assert graphs.captures == captures


def test_an_output_is_the_callers_own(net):
    sample, sampler = GraphSampler(net, graphs=RecordedGraphs()), SAMPLERS[0]
    first = sample(sampler, batch(2, 0)[0], {"y": batch(2, 0)[1]})
    kept = first.clone()
    sample(sampler, batch(2, 1)[0], {"y": batch(2, 1)[1]})
    assert torch.equal(first, kept)
    first.add_(1)  # no inference tensor either
    assert not first.is_inference()


def test_what_shapes_the_loop_is_captured_apart(net):
    """Other steps, another solver, guidance, an interval, an image size; an equal plan built anew is no new kind."""
    graphs = RecordedGraphs()
    sample = GraphSampler(net, graphs=graphs)
    x_T, y = batch(2)
    vp = VPSchedule()
    kinds = [
        (DPMSolverSinglestep(vp, 8), x_T, 0.0, (0.0, 1.0)),
        (DPMSolverSinglestep(vp, 9), x_T, 0.0, (0.0, 1.0)),
        (DPMSolverPPSinglestep(vp, 8), x_T, 0.0, (0.0, 1.0)),
        (DPMSolverSinglestep(vp, 8), x_T, 0.4, (0.0, 1.0)),
        (DPMSolverSinglestep(vp, 8), x_T, 0.4, (0.2, 0.6)),
        (DPMSolverSinglestep(vp, 8), torch.randn(2, 3, 6, 6), 0.0, (0.0, 1.0)),
    ]
    for _ in range(2):
        for sampler, noise, scale, interval in kinds:
            got = sample(sampler, noise, {"y": y}, {"y": NULL}, scale, interval)
            assert torch.equal(got, plain(net, sampler, noise, y, scale, interval))
    assert graphs.captures == sample.captures == len(kinds)
    sample(DPMSolverSinglestep(vp, 8), x_T, {"y": y})
    assert graphs.captures == len(kinds)


def test_the_least_recently_used_capture_makes_room(net):
    graphs = RecordedGraphs(held=1000)
    sample = GraphSampler(net, max_bytes=3000, graphs=graphs)  # two captures and their few inputs
    x_T, y = batch(2)
    a, b, c = (DPMSolverPPMultistep(VPSchedule(), n) for n in (2, 3, 4))
    for sampler, captures in [(a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4)]:  # c drops b, which was used before a
        sample(sampler, x_T, {"y": y})
        assert graphs.captures == captures and sample.bytes <= 3000
    sample.clear()
    assert sample.captures == sample.bytes == 0


def test_a_capture_over_the_bound_is_not_kept(net):
    graphs = RecordedGraphs(held=5000)
    sample = GraphSampler(net, max_bytes=3000, graphs=graphs)
    x_T, y = batch(2)
    with pytest.warns(RuntimeWarning, match="uncaptured: its 5,4.. bytes are over the bound of 3,000"):
        first = sample(SAMPLERS[0], x_T, {"y": y})
    assert torch.equal(first, plain(net, SAMPLERS[0], x_T, y)) and sample.bytes == 0


def test_what_cannot_be_captured_runs_uncaptured_and_says_why_once():
    def reads_a_value(x, t):
        return torch.tanh(x) * float(t[0])

    graphs, x_T = RecordedGraphs(), batch(2)[0]
    sample = GraphSampler(reads_a_value, graphs=graphs)
    with pytest.warns(RuntimeWarning, match="^sampling runs uncaptured: the host reads a value$"):
        first = sample(SAMPLERS[0], x_T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = sample(SAMPLERS[0], x_T[:1])
    expected = SAMPLERS[0](reads_a_value, x_T)
    assert torch.equal(first, expected) and torch.equal(second, expected[:1]) and graphs.captures == 1


def test_without_a_gpu_the_default_runs_uncaptured_and_says_so(net):
    x_T, y = batch(2)
    with pytest.warns(RuntimeWarning, match="CUDA graphs need a CUDA device, not cpu"):
        got = GraphSampler(net)(SAMPLERS[3], x_T, {"y": y}, keys=torch.tensor([1, 2]))
    assert torch.equal(got, plain(net, SAMPLERS[3], x_T, y, keys=torch.tensor([1, 2])))


def test_weights_may_change_in_place_and_may_move(net):
    graphs, (x_T, y) = RecordedGraphs(), batch(2)
    sample = GraphSampler(net, graphs=graphs)
    sample(SAMPLERS[0], x_T, {"y": y})
    with torch.no_grad():
        net.label.weight.mul_(2)
    assert torch.equal(sample(SAMPLERS[0], x_T, {"y": y}), plain(net, SAMPLERS[0], x_T, y))
    assert graphs.captures == 1
    net.label.weight = nn.Parameter(torch.randn(NULL + 1, 3))
    assert torch.equal(sample(SAMPLERS[0], x_T, {"y": y}), plain(net, SAMPLERS[0], x_T, y))
    assert graphs.captures == 2 and sample.captures == 1


def test_decoding_is_part_of_the_loop(net):
    (x_T, y), sampler = batch(2), SAMPLERS[0]
    sample = GraphSampler(net, decode=lambda z: z.mean(1, keepdim=True).clamp(-1, 1), graphs=RecordedGraphs())
    for _ in range(2):
        got = sample(sampler, x_T, {"y": y})
        assert torch.equal(got, plain(net, sampler, x_T, y).mean(1, keepdim=True).clamp(-1, 1))


def test_outside_the_guidance_interval_one_branch_runs(net):
    """Eight steps of a grid uniform in time, t = 1, 0.875, ...: those from 0.3 to 0.7 take both branches."""
    sampler, (x_T, y) = DPMSolverPPMultistep(SDSchedule(), 8), batch(2)
    plain(net, sampler, x_T, y, 0.4, (0.3, 0.7))
    assert net.rows == [4 if 0.3 <= stage.t <= 0.7 else 2 for stage in sampler.stages]
    assert net.rows.count(4) == 3


def test_noise_of_a_captured_sde_depends_on_seed_and_index_only(net):
    """Two batches of two, a batch of four and a reversed one are the same four samples."""
    sampler, (x_T, y) = SAMPLERS[3], batch(4)
    sample = GraphSampler(net, graphs=RecordedGraphs())

    def draw(rows):
        return sample(sampler, x_T[rows], {"y": y[rows]}, keys=sample_generators(7, rows))

    together = draw([0, 1, 2, 3])
    assert torch.equal(torch.cat([draw([0, 1]), draw([2, 3])]), together)
    assert torch.equal(draw([3, 2, 1, 0]).flip(0), together)
    assert not torch.equal(sample(sampler, x_T, {"y": y}), sample(sampler, x_T, {"y": y}))  # without keys: fresh noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_T": torch.empty(0, 3, 4, 4)}, r"at least one sample, got \(0, 3, 4, 4\)"),
        ({"scale": 0.4}, "guidance needs a condition"),
        ({"scale": 0.4, "condition": {"y": torch.zeros(2, dtype=torch.long)}}, "expected a null value for y"),
        (
            {"condition": {"y": torch.zeros(3, dtype=torch.long)}},
            r"condition.y: expected 2 rows, one per sample, got \(3,\)",
        ),
        (
            {"scale": 0.4, "condition": {"y": torch.zeros(2).long()}, "null": {"y": NULL}, "interval": (0.5, 0.2)},
            "expected 0 <= first <= last <= 1",
        ),
    ],
)
def test_wrong_input_is_named(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        GraphSampler(net, graphs=RecordedGraphs())(SAMPLERS[0], **({"x_T": batch(2)[0]} | arguments))
