"""Captured sampling on a GPU: the plain loop's numbers bit for bit, in bounded memory, with a way out where capture
fails.
"""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import autoencoders
from uvit_fast import build_model, load_config, sampling
from uvit_fast.data.autoencoders import Scaling, decoder
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.noise import sample_generators, sample_noise
from uvit_fast.diffusion.predictions import Velocity
from uvit_fast.diffusion.samplers import (
    DPMSolverPPMultistep,
    DPMSolverPPSinglestep,
    DPMSolverSinglestep,
    EulerMaruyama,
    Heun,
)
from uvit_fast.diffusion.schedules import FlowSchedule, SDSchedule, VPSchedule
from uvit_fast.kernels.ops.solver_step import Update, normal, reference, solver_step, why_not
from uvit_fast.sampling.captured import GraphSampler

pytestmark = pytest.mark.gpu
NULL, SHAPE = 10, (4, 8, 8)
SAMPLERS = [
    DPMSolverSinglestep(VPSchedule(), 50),
    DPMSolverPPSinglestep(SDSchedule(), 50),
    DPMSolverPPMultistep(SDSchedule(), 20),
    EulerMaruyama(VPSchedule(), 30),
    Heun(FlowSchedule(), 21, prediction=Velocity()),
    DPMSolverPPMultistep(FlowSchedule(), 20, prediction=Velocity()),
]


class Net(nn.Module):
    """Small and bf16, with what a U-ViT is made of: a strided convolution, attention, linear layers, an embedding."""

    def __init__(self, width=64):
        super().__init__()
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.label = nn.Embedding(NULL + 1, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 16)

    def forward(self, x, t, y=None):
        tokens = self.patch(x.to(self.out.weight.dtype)).flatten(2).transpose(1, 2)  # (B, 16, D)
        tokens = tokens + torch.sin(t / 100).to(tokens.dtype).view(-1, 1, 1)
        if y is not None:
            tokens = tokens + self.label(y)[:, None]
        q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in self.qkv(tokens).chunk(3, -1))
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.pixel_shuffle(self.out(tokens).transpose(1, 2).unflatten(2, (4, 4)), 2)  # (B, 4, 8, 8)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().to("cuda", torch.bfloat16).requires_grad_(False)


def batch(size, seed=0):
    y = torch.randint(NULL, (size,), generator=torch.Generator().manual_seed(seed)).cuda()
    return sample_noise(seed, range(size), SHAPE).cuda(), y, sample_generators(seed, range(size), "cuda")


@torch.no_grad()
def plain(net, sampler, x_T, y, scale, keys=None, interval=(0.0, 1.0)):
    eps_fn = Guidance(net, {"y": y}, {"y": NULL}, scale, interval) if scale else partial(net, y=y)
    return sampler(eps_fn, x_T, keys)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("scale", [0.0, 0.4])
def test_replays_are_the_plain_loop_bit_for_bit(net, sampler, scale):
    sample, outputs = GraphSampler(net), []
    for seed in range(3):
        x_T, y, keys = batch(8, seed)
        s = scale * (1 + seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = sample(sampler, x_T, {"y": y}, {"y": NULL}, s, keys=keys)
        outputs.append((got, plain(net, sampler, x_T, y, s, keys)))
    assert sample.captures == 1
    for got, expected in outputs:  # after all replays: no output was overwritten
        assert torch.equal(got, expected) and got.isfinite().all()


def test_an_interval_and_a_padded_batch_are_captured_too(net):
    sample, sampler = GraphSampler(net), SAMPLERS[1]
    sample(sampler, batch(8)[0], {"y": batch(8)[1]}, {"y": NULL}, 0.4, (0.2, 0.7))
    x_T, y, _ = batch(8, seed=1)
    got = sample(sampler, x_T[:3], {"y": y[:3]}, {"y": NULL}, 0.4, (0.2, 0.7))
    assert sample.captures == 1 and torch.equal(got, plain(net, sampler, x_T, y, 0.4, interval=(0.2, 0.7))[:3])


def test_a_capture_made_beforehand_is_the_one_that_replays(net):
    """A thousand steps after a rehearsal of a few: everything lazy was done before the capture."""
    sample, (x_T, y, keys) = GraphSampler(net), batch(2)
    arguments = EulerMaruyama(VPSchedule(), 1000), x_T, {"y": y}, {"y": NULL}, 0.4, (0.1, 0.8), keys
    assert sample.prepare(*arguments) and sample.captures == 1
    expected = plain(net, arguments[0], x_T, y, 0.4, keys, (0.1, 0.8))
    assert torch.equal(sample(*arguments), expected) and sample.captures == 1


def test_the_network_itself_is_captured_with_text(cores):
    """A U-ViT with its fused kernels, through the sampling function: noise, features, guidance in an interval."""
    overrides = ["model.embed_dim=128", "model.depth=4", "model.num_heads=2", "sample.steps=8"]
    cfg = load_config("configs/s2_coco.yaml", overrides)
    net = build_model(cfg).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    context, null = torch.randn(6, 77, 768), torch.randn(77, 768)
    options = {"context": context, "null_context": null, "guidance_interval": (0.1, 0.9)}
    graphs = GraphSampler(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = list(sampling.sample(net, cfg, 6, batch=3, graphs=graphs, **options))
    for got, expected in zip(captured, sampling.sample(net, cfg, 6, batch=3, **options), strict=True):
        assert torch.equal(got, expected) and got.isfinite().all()
    assert graphs.captures == 1


@pytest.mark.parametrize("make", [autoencoders.kl, lambda: autoencoders.dc(latent_channels=4)], ids=["kl", "dc"])
def test_decoding_in_chunks_is_captured(net, make):
    pytest.importorskip("diffusers")
    scaling = Scaling((0.1, 0.2, 0.3, 0.4), 0.5)
    decode = decoder(make().to("cuda", torch.bfloat16), scaling, chunk=3)
    sample, (x_T, y, _) = GraphSampler(net, decode), batch(8)
    for _ in range(2):
        got = sample(SAMPLERS[1], x_T, {"y": y}, {"y": NULL}, 0.4)
        with torch.inference_mode():
            expected = decode(plain(net, SAMPLERS[1], x_T, y, 0.4))
        assert got.shape[:2] == (8, 3) and got.shape[2] > x_T.shape[2] and torch.equal(got, expected)
    assert sample.captures == 1


def test_weights_that_change_in_place_are_seen(net):
    sample, (x_T, y, _) = GraphSampler(net), batch(4)
    sample(SAMPLERS[0], x_T, {"y": y})
    net.out.weight.mul_(0.5)
    assert torch.equal(sample(SAMPLERS[0], x_T, {"y": y}), plain(net, SAMPLERS[0], x_T, y, 0.0))
    assert sample.captures == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_is_captured(frozen):
    """fp32 weights that learn, as in a training preview:
    autocast must not hand its short-lived casts to the capture.
    """
    torch.manual_seed(0)
    net, (x_T, y, _) = Net().cuda().requires_grad_(not frozen), batch(4)
    sample = GraphSampler(net)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            got, expected = sample(SAMPLERS[0], x_T, {"y": y}), plain(net, SAMPLERS[0], x_T, y, 0.0)
        assert torch.equal(got, expected)


def test_a_network_that_syncs_runs_uncaptured_and_leaves_the_device_well(net):
    def reads_a_value(x, t, y=None):
        return net(x, t, y) * float(t[0] > 0)

    sample, (x_T, y, _) = GraphSampler(reads_a_value), batch(4)
    with pytest.warns(RuntimeWarning, match="sampling runs uncaptured: .*captur"):
        got = sample(SAMPLERS[0], x_T, {"y": y})
    assert torch.equal(got, plain(net, SAMPLERS[0], x_T, y, 0.0)) and sample.captures == 0
    assert torch.randn(1000, device="cuda").std() > 0.5  # the generator is not left capturing
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.empty(1 << 20, device="cuda").fill_(1)
    torch.cuda.empty_cache()
    again = GraphSampler(net)
    assert torch.equal(again(SAMPLERS[0], x_T, {"y": y}), got) and again.captures == 1


def test_memory_stays_within_the_bound(net):
    """Each capture has its own pool; a dropped one gives it back, and no more are dropped than must be."""
    first = GraphSampler(net)
    x_T, y, _ = batch(64)
    first(DPMSolverPPMultistep(SDSchedule(), 10), x_T, {"y": y})
    assert first.bytes > x_T.nbytes
    bound = 2 * first.bytes + first.bytes // 2
    first.clear()
    torch.cuda.empty_cache()
    before, sample, kept = torch.cuda.memory_reserved(), GraphSampler(net, max_bytes=bound), []
    for steps in range(10, 20):
        sample(DPMSolverPPMultistep(SDSchedule(), steps), x_T, {"y": y})
        newest = next(reversed(sample._captures.values())).bytes
        while sum(kept) + newest > bound:
            kept.pop(0)
        kept.append(newest)
        assert (sample.bytes, sample.captures) == (sum(kept), len(kept))
        assert sample.bytes <= bound and len(kept) >= 1
    assert len(kept) < 10
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    assert held - before <= bound + 2**26  # and what the allocator keeps for the plain tensors
    claimed = sample.bytes
    sample.clear()
    torch.cuda.empty_cache()
    given_back = held - torch.cuda.memory_reserved()
    assert abs(given_back - claimed) <= 2**22  # the allocator's segments are of 2 MiB


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "update",
    [
        Update(0.0, 1.0, 0.9, 0.0, (0.3,)),
        Update(1.7, -0.4, 0.9, 0.0, (0.3, -0.7, 0.2)),
        Update(0.0, 1.0, 0.9, 0.6, (0.3,)),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5, 103), (500, 4, 32, 32)])  # an odd tail; the latents of 500 images
def test_the_fused_update_is_the_reference(update, guided, shape):
    torch.manual_seed(0)
    x, start, *history = torch.randn(1 + len(update.outputs), *shape, device="cuda")
    eps = torch.randn(shape[0] * (1 + guided), *shape[1:], device="cuda").bfloat16()
    scale = torch.tensor(0.4, device="cuda") if guided else None
    arguments = eps, x, start, history, scale, sample_generators(0, range(shape[0]), "cuda"), 17
    assert why_not(x) is None
    expected, m = reference(update, *arguments)
    got, got_m = solver_step(update, torch.tensor(update.row(), device="cuda"), *arguments)
    torch.testing.assert_close(got_m, m, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6)


def test_noise_is_the_same_on_every_device():
    keys = sample_generators(3, range(4))
    torch.testing.assert_close(normal(keys.cuda(), 5, 1000).cpu(), normal(keys, 5, 1000), rtol=1e-5, atol=5e-6)


def test_a_captured_sample_depends_on_seed_and_index_only(net):
    """Noise and solver are exact; only the network's own rounding may depend on the batch size, so it is elementwise
    here.
    """
    sampler, (x_T, _, keys) = SAMPLERS[3], batch(8)
    sample = GraphSampler(lambda x, t: torch.tanh(x) * torch.sin(t).view(-1, 1, 1, 1))
    together = sample(sampler, x_T, keys=keys)
    apart = torch.cat([GraphSampler(sample.model)(sampler, x_T[i : i + 2], keys=keys[i : i + 2]) for i in (0, 2, 4, 6)])
    assert torch.equal(together, apart)
