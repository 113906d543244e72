"""A network in FP8, by the reference arithmetic: close to the network, which stays as it is; refused where it cannot
run.
"""

import functools
import math
import operator
from types import SimpleNamespace

import pytest
import torch

from tests.recorded import RecordedGraphs
from uvit_fast.config import load_config
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model import fp8
from uvit_fast.model.uvit import UViT
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.weights import load_for_sampling

SIZES = {"img_size": 8, "in_chans": 4, "patch_size": 2, "embed_dim": 128, "depth": 4, "num_heads": 2, "num_classes": 11}


def network(**more) -> UViT:
    torch.manual_seed(0)
    return UViT(**SIZES | more).bfloat16().eval().requires_grad_(False)


@pytest.mark.parametrize("more", [{}, {"skip": "none", "conv": False}], ids=str)
def test_eps_is_close_and_the_weights_stay(more):
    net = network(**more)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([10.0, 500.0, 990.0]), torch.tensor([0, 3, 10])
    narrow = fp8.Fp8UViT(net, fp8_block.REFERENCE)
    eps, exact = narrow(x, t, y), network(**more).float()(x, t, y)
    assert eps.dtype == x.dtype and (eps - exact).norm() < 0.1 * exact.norm()
    assert (eps - exact).norm() > (net(x, t, y) - exact).norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_plain_calls_replay_themselves():
    net = fp8.Fp8UViT(network(), fp8_block.REFERENCE)
    net.captures.graphs = RecordedGraphs()
    for seed in range(4):
        torch.manual_seed(seed)
        given = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([seed, 10])
        net.cuda_graphs = False
        expected = net(*given)
        net.cuda_graphs = True
        assert torch.equal(net(*given), expected)
    assert net.captures.graphs.captures == 1


def test_calibration_rounds_what_runs_in_e4m3_for_what_it_meets():
    net, (x, t, y) = network(), (torch.randn(8, 4, 8, 8), torch.linspace(10, 990, 8), torch.arange(8))
    narrow = fp8.Fp8UViT(net, fp8_block.REFERENCE, ("in_blocks.0.mlp", "*.skip_linear"))
    narrow.captures.graphs = RecordedGraphs()
    before = [*narrow.layers]
    for _ in range(3):
        narrow(x, t, y)
    assert len(narrow.captures) == 1
    narrow.calibrate(lambda: [narrow(x, t, y), narrow(x[:2], t[:2], y[:2])])
    assert len(narrow.captures) == 0 and narrow.by is fp8_block.REFERENCE and narrow.cuda_graphs
    assert narrow.layers[0].fc1 is None and narrow.layers[3].skip is None
    for old, new in zip(before, narrow.layers):
        for kind in ("qkv", "proj", "fc1", "fc2"):
            a, b = getattr(old, kind), getattr(new, kind)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.weight.shape == b.weight.shape and not torch.equal(a.weight.float(), b.weight.float())
    exact = network().float()(x, t, y)
    calibrated, narrow.layers = narrow(x, t, y), before
    assert (calibrated - exact).norm() < (narrow(x, t, y) - exact).norm()
    calibrated = [*narrow.layers]
    narrow.calibrate(lambda: narrow(x * math.inf, t, y))  # a network that has diverged is found by its samples
    assert all(map(operator.is_, narrow.layers, calibrated))
    narrow.layers = before
    with pytest.raises(ZeroDivisionError):
        narrow.calibrate(lambda: 1 / 0)
    assert narrow.by is fp8_block.REFERENCE and narrow.layers is before


@pytest.fixture(scope="module")
def error():
    """The relative error of what stays in bf16."""
    net, g = network(), torch.Generator().manual_seed(0)
    x, t, y = (
        torch.randn(4, 4, 8, 8, generator=g),
        torch.tensor([10.0, 300.0, 600.0, 990.0]),
        torch.tensor([0, 3, 7, 10]),
    )
    exact = network().float()(x, t, y)

    @functools.cache
    def of(*keep: str) -> float:
        return float((fp8.Fp8UViT(net, fp8_block.REFERENCE, keep)(x, t, y) - exact).norm() / exact.norm())

    return of


@pytest.mark.parametrize(
    "keep",
    [
        ("in_blocks.0",),  # its output is a bf16 skip's e4m3 copy, and what the next block writes over
        ("out_blocks.-1",),  # reads in bf16 what an e4m3 block left
        ("in_blocks.0", "out_blocks.-1"),  # a skip in bf16, which stays while its stream goes on
        ("*.skip_linear", "in_blocks.1.mlp", "mid_block.attn"),
    ],
    ids=str,
)
def test_what_is_kept_in_bf16_costs_no_error(keep, error):
    """Errors of different layers are independent: what is kept and all else make up the whole."""
    kept = fp8._kept(4, keep)
    others = tuple(part for part in fp8.parts(4) if part not in kept)
    assert math.hypot(error(*keep), error(*others)) == pytest.approx(error(), rel=0.1)


def test_all_kept_is_the_network_itself():
    net, (x, t, y) = network(), (torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([0, 3]))
    assert torch.equal(fp8.Fp8UViT(net, fp8_block.REFERENCE, ["*"])(x, t, y), net(x, t, y))


def test_parts_that_there_are_not_are_named():
    with pytest.raises(
        UserError, match=r"sample.fp8_keep: the network has no sublayer 'in_block.0'; did you mean in_bl"
    ):
        fp8.check(load_config("h2_256").model, None, ["in_block.0"])
    assert fp8._kept(4, ["out_blocks.-2"]) == {f"out_blocks.0.{part}" for part in ("skip_linear", "attn", "mlp")}
    with pytest.raises(UserError, match="no sublayer 'out_blocks.-3'"):
        fp8._kept(4, ["out_blocks.-3"])


def test_it_is_refused_where_it_cannot_run(tmp_path):
    with pytest.raises(
        UserError, match=r"fp8: its kernels need compute capability 9\.0 \(H100, H200\), got no CUDA device$"
    ):
        fp8.Fp8UViT(network())
    with pytest.raises(UserError, match="expected a network in bfloat16, got torch.float32"):
        fp8.Fp8UViT(network().float(), fp8_block.REFERENCE)
    with pytest.raises(UserError, match="head dim must be 64, 72 or 80, got 32; expected bf16"):  # nor its arithmetic
        fp8.Fp8UViT(UViT(**SIZES | {"num_heads": 4}).bfloat16(), fp8_block.REFERENCE)
    changed = network()
    changed.mid_block.mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="mid_block was changed"):
        fp8.Fp8UViT(changed, fp8_block.REFERENCE)
    cfg = load_config("configs/digits.yaml", ["sample.precision=fp8"])
    (file := tmp_path / "weights.pth").touch()
    with pytest.raises(
        UserError, match="sample.precision=fp8: .*got no CUDA device; the widths 96 and .* 64; the head dim .* got 24$"
    ):  # before the file is read
        load_for_sampling(cfg, file, "cpu")


def test_widths_that_no_kernel_takes_are_named(monkeypatch):
    monkeypatch.setattr(fp8_block, "architecture", lambda device: 90)
    hopper = torch.device("cuda")
    assert fp8_block.why_not(1152, 16, 4608, hopper) is None and fp8_block.why_not(512, 8, 2048, hopper) is None
    assert "multiples of 64" in fp8_block.why_not(96, 4, 384, hopper)
    assert "head dim must be 64, 72 or 80, got 32" in fp8_block.why_not(512, 16, 2048, hopper)


def test_a_gpu_that_it_does_not_run_on_is_named_with_all_that_does_not_fit(monkeypatch):
    a100 = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", major=8, minor=0)
    monkeypatch.setattr("uvit_fast.kernels.runtime.device._properties", lambda index: a100)
    words = r"\(H100, H200\), got NVIDIA A100-SXM4-80GB, 8.0; the head dim must be 64, 72 or 80, got 24; expected bf16$"
    with pytest.raises(UserError, match=words):
        fp8.check(load_config("digits_eps", ["model.embed_dim=192", "model.num_heads=8"]).model, torch.device("cuda"))


def test_networks_that_no_kernel_takes_are_named(monkeypatch):
    monkeypatch.setattr(fp8_block, "architecture", lambda device: 90)
    hopper, published = (
        torch.device("cuda"),
        [f"configs/{name}.yaml" for name in ("h4_512", "s2deep_coco", "s2_cifar10")],
    )
    for name in published:
        fp8.check(load_config(name).model, hopper)
    for override, words in (("img_size=128", "takes at most 512 tokens, got 4098"), ("skip=add", "model.skip=add")):
        with pytest.raises(UserError, match=f"sample.precision=fp8: .*{words}.*; expected bf16"):
            fp8.check(load_config("configs/h2_256.yaml", [f"model.{override}"]).model, hopper)
