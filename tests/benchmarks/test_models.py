"""The peers are the published network, and what is told apart is told apart."""

import functools

import pytest
import torch

from benchmarks import models
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model.fp8 import Fp8UViT

TINY = ["model.embed_dim=64", "model.num_heads=1", "model.depth=4", "model.img_size=16"]


@pytest.fixture(scope="module")
def published():
    return models.Agreement(models.config("S", "eager", overrides=TINY), "cpu")


def network(provider, **changes):
    return models.model(models.config("S", provider, overrides=TINY), provider, "cpu", **changes)


@torch.no_grad()
def test_ours_and_a_peer_have_the_same_weights_and_compute_the_same(published):
    assert 1e-3 < published.own < 2e-2  # of bf16
    for provider in ("ours", "eager"):
        for batch in (1, 6):
            assert published.check(network(provider), provider, batch) < 2 * published.own


@torch.no_grad()
def test_ours_in_fp8_is_told_from_bf16_and_agrees(published, monkeypatch):
    monkeypatch.setattr(models, "Fp8UViT", functools.partial(Fp8UViT, by=fp8_block.REFERENCE))
    allowed_bf16 = 2 * published.own + 1e-3
    assert allowed_bf16 < published.check(network("ours-fp8"), "ours-fp8", 6) < 2**-4
    assert models.dtype("ours-fp8") == "fp8"


@torch.no_grad()
@pytest.mark.parametrize("provider", ["compiled", "torchao-fp8", "ours-fp8"])
def test_a_block_too_few_is_seen_in_bf16_and_in_float8(published, provider):
    net = network("eager")
    net.blocks[1].compute = lambda x, skip, sums: (x, None)
    net.blocks[3].compute = lambda x, skip, sums: (x, None)
    with pytest.raises(RuntimeError, match=f"{provider}: eps is .* from the published network's"):
        published.check(net, provider, 4)


def test_blocks_are_compiled_one_by_one_and_graphs_whole(monkeypatch):
    compiled, whole = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    monkeypatch.setattr(torch, "compile", lambda net, **how: whole.append(how) or net)
    network("compiled", training=True)
    assert compiled == [("PublishedBlock", {"dynamic": False})] * 5 and not whole
    network("compiled-graphs")
    assert len(compiled) == 5 and whole == [{"mode": "reduce-overhead", "dynamic": False}]


def test_what_cannot_run_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert models.runnable(["ours", "torchao-fp8"]) == ["ours"] and models.runnable(["eager"]) == ["eager"]
    assert "torchao-fp8: it needs torchao: pip install torchao" in capsys.readouterr().out
    assert models.runnable(["ours", "ours-fp8"], "cpu") == ["ours"]
    assert "ours-fp8: its kernels need compute capability 9.0" in capsys.readouterr().out
