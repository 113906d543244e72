"""Products of few tokens on sm_90, in every form of tile: against fp64, the same bits each time,
counters left at zero.
"""

import pytest
import torch

from uvit_fast.kernels.attention import sm90_forward
from uvit_fast.kernels.gemm import sm90
from uvit_fast.kernels.gemm.contract import Call
from uvit_fast.kernels.layernorm.sums import Summed
from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.runtime import launch, once, tuning
from uvit_fast.kernels.runtime.device import architecture
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.model.uvit import UViT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available() or architecture(torch.device("cuda")) != 90, reason="the core for sm_90"
)]  # fmt: skip
FORMS = [
    {"tokens": 64, "tail": 8, "stages": 7},
    {"tokens": 64, "tail": 32, "stages": 6},
    {"tokens": 128, "stages": 5},
    {"tokens": 128, "tail": 32, "stages": 4},
    {"tokens": 128, "tail": 64, "stages": 4, "staging": 64},
    {"tokens": 256},
    {"tokens": 64, "stages": 6, "halves": True},
    {"tokens": 32, "part": 16, "stages": 8, "halves": True},
    {"tokens": 128, "stages": 4, "halves": True},
]


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def per_chunk(x):
    """Sums and squares around the mean of every 64 features, (D / 64, 2, M), fp64."""
    x = x.double().unflatten(1, (-1, 64))
    return torch.stack([x.sum(2), x.var(2, unbiased=False) * 64]).permute(2, 0, 1).contiguous()


def named(form: dict) -> str:
    return f"halves_{form['tokens']}" if "halves" in form else f"{form['tokens']}+{form.get('tail', 0)}"


SHARED = [  # halves of K are one program's
    pytest.param(form, shares, id=f"{named(form)}-{shares}_shares")
    for form in FORMS
    for shares in ((1,) if "halves" in form else (1, 2, 5))
]


@pytest.mark.parametrize(("form", "shares"), SHARED)
@pytest.mark.parametrize("epilogue", ["plain", "gelu", "residual", "two_sources"])
def test_products_in_tiles_and_shares(epilogue, form, shares, monkeypatch):
    torch.manual_seed(0)
    M, N, K = 258 * (1 if form["tokens"] <= 64 else 4), 384, 1152
    monkeypatch.setattr(tuning, "few", lambda *of: {"part": 32, "shares": shares, **form})
    x, w, bias, side = random(M, K) + 0.3, random(N, K, scale=K**-0.5), random(N), random(M, N)
    exact, given = x.double() @ w.double().T, {}
    if epilogue in ("plain", "gelu"):  # after a LayerNorm whose mean the weight does not see
        w = (w.double() - w.double().mean(1, keepdim=True)).to(w.dtype)
        bias, variance = bias.float(), x.double().var(1, unbiased=False)
        given["stats"] = Summed(per_chunk(x).float(), 1e-5)
        exact = x.double() @ w.double().T * (variance[:, None] + 1e-5).rsqrt() + bias.double()
        exact = torch.nn.functional.gelu(2 * exact) if epilogue == "gelu" else exact
    else:
        given["sums"] = torch.empty(N // 64, 2, M, device="cuda")
        exact += bias.double()
    if epilogue == "residual":
        given["side"] = side
        exact += side.double()
    if epilogue == "two_sources":
        given["x2"] = x[:, 576:].contiguous()
        x = x[:, :576].contiguous()
    kind = "plain" if epilogue == "two_sources" else epilogue
    with once.stretch({}):
        outs = [sm90.core.product(Call(kind, x, Linear(w, bias), **given)).out for _ in range(5)]
        assert not once.counters(x.device, 1).any()
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert (outs[0].double() - exact).norm() < 4e-3 * exact.norm()
    assert (outs[0].double() - exact).abs().max() < 1.2e-2 * exact.abs().max()
    if "sums" in given:
        left = per_chunk(outs[0])
        assert (given["sums"] - left).abs().max() < 1e-4 * left.abs().max()


@pytest.mark.parametrize(("heads", "D"), [(16, 72), (8, 64)])
def test_attention_is_the_same_whoever_has_the_queries(heads, D):
    qkv, outs = random(2, 258, 3, heads, D), []
    for n, early in ((1, False), (2, False), (5, False), (5, True)):
        out, lse = random(2, 258, heads * D), random(2, heads, 258, dtype=torch.float32)
        kernel, arguments, options = sm90_forward.forward_launch(qkv, out, lse, n, early)
        launch.run(qkv.device, kernel, (2 * heads * n,), arguments, options)
        outs.append((out, lse))
    assert all(torch.equal(a, b) for more in outs[1:] for a, b in zip(more, outs[0]))


@pytest.mark.parametrize(
    ("precision", "D", "heads", "images"),
    [("bf16", 512, 8, 1), ("bf16", 768, 12, 4), ("bf16", 1024, 16, 2), ("bf16", 1152, 16, 1), ("fp8", 512, 8, 1)],
)
def test_early_launches_read_what_the_kernels_before_them_wrote(precision, D, heads, images, monkeypatch):
    """A captured evaluation, replayed for inputs in turns: with launches that wait for each other, with those that the
    table has early, and with all of them early.
    """
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = UViT(img_size=32, in_chans=4, patch_size=2, embed_dim=D, depth=4, num_heads=heads).bfloat16().eval()
    net = Fp8UViT(net.requires_grad_(False)) if precision == "fp8" else net
    inputs, t, found = torch.randn(3, images, 4, 32, 32, device="cuda"), torch.full((images,), 500.0, device="cuda"), {}
    x, few, attention, net.cuda_graphs = inputs[0].clone(), tuning.few, sm90_forward.forward_launch, False
    for way in ("waiting", "as chosen", "all early"):
        if way == "waiting":
            monkeypatch.setattr(tuning, "few", lambda *of: few(*of) | {"early": 0})
            monkeypatch.setattr(sm90_forward, "forward_launch", lambda *of, early: attention(*of))
        elif way == "as chosen":
            monkeypatch.undo()
        else:
            monkeypatch.setattr(tuning, "few", lambda *of: few(*of) | {"early": 8})
        with torch.no_grad(), net.fixed_weights():
            net(x, t)  # folds the weights
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = net(x, t)
            for turn in range(60):
                x.copy_(inputs[turn % 3])
                graph.replay()
                expected = found.setdefault(turn % 3, out.clone())
                assert torch.equal(out, expected), (way, turn)


@pytest.mark.parametrize("shares", [1, 3])
def test_a_network_gives_the_same_bits_from_notes_and_replayed(shares, monkeypatch):
    """A plain call, whose weights may change, and a loop, whose do not, whatever their tiles are."""
    chosen = {"tokens": 64, "tail": 8, "part": 32, "stages": 7, "shares": shares, "sums": True}
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = UViT(img_size=32, in_chans=4, patch_size=2, embed_dim=1152, depth=4, num_heads=16).bfloat16().eval()
    B = 1 + shares  # notes of ops are by shape, and would be those of the other tiles
    inputs = torch.randn(B, 4, 32, 32, device="cuda"), torch.full((B,), 500.0, device="cuda")
    net.cuda_graphs = False
    with torch.no_grad():
        with net.fixed_weights():
            before = net(*inputs)
        monkeypatch.setattr(tuning, "few", lambda *of: chosen)
        with net.fixed_weights():
            net(*inputs)
            looped = net(*inputs)
        plain = [net(*inputs) for _ in range(3)]
        net.cuda_graphs = True
        plain += [net(*inputs) for _ in range(4)]
    assert len(net.captures) == 1 and all(torch.equal(out, looped) for out in plain)
    assert (looped.float() - before.float()).norm() < 1e-2 * before.float().norm()
