"""FP8 on a GPU: each product against the same arithmetic in PyTorch, attention's e4m3 result, a network, its captured
loop.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels import fp8_cases as cases
from tests.kernels.fp8_cases import off
from uvit_fast.build import build_sampler
from uvit_fast.config import load_config
from uvit_fast.diffusion.caching import LayerCache
from uvit_fast.kernels.attention import sm90_forward, sm90_tiles
from uvit_fast.kernels.gemm import fp8, sm90_fp8
from uvit_fast.kernels.layernorm import added, fold
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.kernels.quantise import E4M3, narrow, unseen
from uvit_fast.model.cached import sublayers
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.model.uvit import UViT
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.captured import GraphSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="FP8 is of compute capability 9.0",
    ),
]


@pytest.fixture(autouse=True)
def _exact_references():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def copied(rest: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in rest.items()}


@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize(
    "M, D",
    [
        (33024, 1152),  # H/2 at 128 images: every tile full
        (37 * 257, 512),  # tiles cut off in tokens
        (5 * 334, 768),  # few tokens, tiles of 64
        (258, 1024),  # one image
        (1, 192),  # one token; a second source that begins past a padded step
    ],
    ids=str,
)
def test_a_product_is_its_arithmetic_but_for_the_tensor_cores_sums(name, M, D):
    epilogue, x, layer, rest = cases.arguments(name, M, D, "cuda")
    x_before = copied(rest).get("side")
    made, want = sm90_fp8.product(epilogue, x, layer, **copied(rest)), fp8.reference(epilogue, x, layer, **copied(rest))
    cases.check(made, want)
    if "side" in rest and made.wide is not None:
        again = sm90_fp8.product(epilogue, x, layer, overwrite=False, **rest)  # which leaves the residual as it is
        assert torch.equal(made.wide, again.wide) and torch.equal(made.narrow, again.narrow)
        assert torch.equal(rest["side"], x_before) and again.wide.data_ptr() != rest["side"].data_ptr()


@pytest.mark.parametrize("mean", [0.0, 8.0])
def test_the_mean_does_not_show(mean):
    epilogue, x, layer, rest = cases.arguments("qkv", 2580, 1152, "cuda", mean)
    assert off(sm90_fp8.product(epilogue, x, layer, **rest).wide, fp8.reference(epilogue, x, layer, **rest).wide) < 6e-3


@pytest.mark.parametrize(
    "B, L, H, D", [(8, 258, 16, 72), (3, 257, 8, 64), (2, 256, 16, 72), (2, 334, 8, 64), (2, 66, 4, 80)]
)
def test_attention_leaves_in_e4m3_what_it_leaves_in_bf16(B, L, H, D):
    qkv = torch.randn(B, L, 3, H, D, device="cuda", dtype=torch.bfloat16)
    (ours, lse), (wide, expected) = sm90_forward.forward(qkv, E4M3), sm90_forward.forward(qkv)
    want = narrow(wide)[..., torch.tensor(sm90_tiles.narrow(H, D), device="cuda")]
    assert torch.equal(lse, expected)
    assert off(ours, want) < 2e-2  # rounded once, not by way of bf16: some values are their neighbours


def test_statistics_quantise_what_they_read():
    x = (torch.randn(1290, 1152, device="cuda") * 3 + 0.3).bfloat16()
    made8 = torch.empty(1290, 1152, device="cuda", dtype=E4M3)
    stats = fold.statistics(x, None, made8)[:, :1290]
    assert torch.allclose(stats, cases.statistics(x)[:, :1290], rtol=1e-4, atol=1e-5)
    assert torch.equal(made8.view(torch.uint8), narrow(x).view(torch.uint8))


@pytest.mark.parametrize("folded", [False, True])
def test_inputs_are_summed_as_in_fp64(folded):
    """By no setting of the process; rstd's second part counts: without it they would be off by 6e-4."""
    x, rstd = narrow(torch.randn(8256, 1152, device="cuda") * 4 + 0.5), torch.rand(8256, device="cuda") + 0.5
    _, total, products = unseen(1152, x.device).plus(x, rstd if folded else None)
    exact = x.float().double() * (rstd[:, None] if folded else 1)
    assert off(products, exact.t() @ exact) < 1e-4 and off(total, exact.sum(0)) < 1e-5


@pytest.mark.parametrize("D", [512, 1152])
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_are_added_in_one_pass(D, count):
    x, *outputs = (torch.randn(1290, D, device="cuda").bfloat16() for _ in range(1 + count))
    made8, want8, out = (torch.empty(1290, D, device="cuda", dtype=kind) for kind in (E4M3, E4M3, torch.bfloat16))
    want = torch.empty_like(out)
    stats, expected = added.add(x, outputs, out, made8), added.reference(x, outputs, want, want8)
    assert torch.equal(out, want) and torch.equal(made8.view(torch.uint8), want8.view(torch.uint8))
    assert torch.allclose(stats[:, :1290], expected, rtol=1e-4, atol=1e-5)
    added.add(x, outputs, x, made8)
    assert torch.equal(x, want)


def network(D: int, heads: int, depth: int = 4, **more) -> UViT:
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = UViT(32, 4, 2, D, depth, heads, **more)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "D, heads, B, text", [(512, 8, 5, True), (768, 12, 37, False), (1024, 16, 3, False), (1152, 16, 7, False)]
)
def test_a_networks_error_is_that_of_its_arithmetic(D, heads, B, text):
    net = network(D, heads, **({"context_dim": 768} if text else {"num_classes": 1001}))
    x, t = torch.randn(B, 4, 32, 32, device="cuda"), torch.rand(B, device="cuda") * 999
    given = {"context": torch.randn(B, 77, 768, device="cuda")} if text else {"y": torch.arange(B, device="cuda")}
    exact = net(x, t, **given)
    net = net.bfloat16()
    ours, theirs = (Fp8UViT(net, by)(x, t, **given) for by in (fp8_block.KERNELS, fp8_block.REFERENCE))
    assert off(ours, exact) < 1.1 * off(theirs, exact) + 1e-3
    assert torch.equal(ours, Fp8UViT(net)(x, t, **given))


@pytest.mark.parametrize("keep", [("in_blocks.0", "out_blocks.-1"), ("in_blocks.0.mlp", "out_blocks.0.skip_linear")])
def test_what_stays_in_bf16_meets_what_does_not(keep):
    """As their reference arithmetic does, and with all of it kept the network itself."""
    net, (x, t, y) = network(1152, 16, num_classes=1001), inputs(7)
    exact = net(x, t, y)
    net = net.bfloat16()
    ours, theirs, whole = (
        off(Fp8UViT(net, *how)(x, t, y), exact)
        for how in ((fp8_block.KERNELS, keep), (fp8_block.REFERENCE, keep), (fp8_block.KERNELS, ()))
    )
    assert ours < 1.1 * theirs + 1e-3 and ours < whole
    assert off(Fp8UViT(net, keep=["*"])(x, t, y), net(x, t, y)) < 5e-3  # in the ops of a block's halves


def test_cached_layers_keep_all_bits_and_reuse_what_was_kept():
    """A sum is not the same bf16 value as what was kept of it: e4m3 rounds some anew,
    which costs no more than before.
    """
    net, held, given = network(1152, 16, num_classes=1001), {}, inputs(7)
    exact, names = net(*given), frozenset(sublayers(4))
    net = Fp8UViT(net.bfloat16())
    whole = net(*given)
    assert torch.equal(net(*given, cache=LayerCache(held, frozenset(), names)), whole)
    for reuse in (names, frozenset(name for name in names if name.endswith("attn"))):
        again = net(*given, cache=LayerCache(held, reuse, frozenset()))
        assert off(again, exact) < 1.1 * off(whole, exact) and off(again, whole) < off(whole, exact)


def inputs(B: int) -> tuple[Tensor, Tensor, Tensor]:
    x, t = torch.randn(B, 4, 32, 32, device="cuda"), torch.rand(B, device="cuda") * 999
    return x, t, torch.arange(B, device="cuda")


@pytest.mark.parametrize("settings", [[], ["sample.sampler=dpmpp_2m", "sample.cache=outer:2"]], ids=["whole", "cached"])
def test_a_captured_loop_is_the_loop_bit_for_bit(settings):
    cfg = load_config("configs/h2_256.yaml", ["sample.steps=5", "model.depth=4", *settings])
    net = Fp8UViT(network(1152, 16, num_classes=1001).bfloat16())
    sampler, graphs = build_sampler(cfg), GraphSampler(net)
    y = torch.arange(3, device="cuda")
    for batch in (3, 2):  # captured, then replayed with fewer
        x_T = torch.randn(3, 4, 32, 32, device="cuda")
        with net.fixed_weights():
            expected = sampler(lambda x, t, **cache: net(x, t, y, **cache), x_T)[:batch]
        assert torch.equal(graphs(sampler, x_T[:batch], {"y": y[:batch]}), expected)
    assert graphs.captures == 1


@pytest.mark.parametrize("D, heads, B", [(1152, 16, 3), (512, 8, 1), (1152, 16, 1), (512, 8, 2), (1024, 16, 8)])
def test_plain_calls_replay_with_the_same_bits(D, heads, B):
    net = Fp8UViT(network(D, heads, num_classes=1001).bfloat16())
    for seed in range(4):
        torch.manual_seed(seed)
        given = inputs(B)
        net.cuda_graphs = False
        expected = net(*given)
        net.cuda_graphs = True
        assert torch.equal(net(*given), expected)
    assert len(net.captures) == 1


def test_an_a100_is_told_what_is_needed(monkeypatch):
    monkeypatch.setattr("uvit_fast.kernels.runtime.device._FORCED", 80)
    with pytest.raises(UserError, match="compute capability 9.0"):
        Fp8UViT(network(512, 8, num_classes=11).bfloat16())
