"""What FP8 costs is measured by the arithmetic that runs, and the page says what the rows say."""

import argparse

import numpy as np
import pytest
import torch

from benchmarks import fp8_page, fp8_quality, models
from benchmarks.common import Rows
from benchmarks.results import Results
from uvit_fast.config import FP8_KEEP, load_config
from uvit_fast.evaluation.classifier import Classifier, ClassifierFeatures
from uvit_fast.evaluation.features import extract
from uvit_fast.evaluation.sources import Images
from uvit_fast.kernels.ops.fp8_block import REFERENCE
from uvit_fast.model.fp8 import Fp8UViT

TINY = ["model.embed_dim=128", "model.num_heads=2", "model.depth=2", "model.img_size=8"]


@pytest.fixture
def given():
    return fp8_quality.random_network("S", 3, torch.device("cpu"), TINY)


@torch.no_grad()
def test_layers_in_e4m3_are_the_ones_that_run(given):
    """All of them together are the FP8 network, but for what it keeps in bf16 and how attention is summed."""
    inputs, net = given.inputs(0.5), given.net
    exact, ours = net(*inputs), Fp8UViT(fp8_quality.in_bf16(given.cfg, net), REFERENCE, ())(*inputs)
    for block in net.blocks:
        block.__class__ = models.PublishedBlock
    with fp8_quality.narrowed(net.blocks, set(fp8_page.KINDS)):
        emulated = net(*inputs)
    cost = models.difference(emulated, exact)
    assert cost > 0.02 and models.difference(ours, exact) == pytest.approx(cost, rel=0.15)
    # bf16 tips some values to their e4m3 neighbours; errors of other values would be 1.41 of the cost apart
    assert models.difference(ours, emulated) < cost
    assert torch.equal(net(*inputs), exact)  # and all is as it was


def test_a_page_has_the_error_by_time_and_by_layer(given, tmp_path):
    rows = Rows("fp8_quality", tmp_path)
    fp8_quality.errors(rows, given)
    rows.write()
    found, name = Results(tmp_path), given.name
    assert fp8_page.networks_of(found) == [name] and len(fp8_page.blocks_of(found, name)) == 3
    text = fp8_page.tables(found)
    assert (
        f"| {name}, FP8, all in e4m3 |" in text
        and "| `skip`: linear layer over the long skip |" in text
        and "Samples" not in text
    )
    squares = [fp8_page.value(found, f"{name}: {kind} alone", "e4m3 in fp32") ** 2 for kind in fp8_page.KINDS]
    whole = fp8_page.value(found, f"{name}: all", "e4m3 in fp32") ** 2
    assert sum(squares) == pytest.approx(whole, rel=0.3)  # errors of different layers are independent
    fp8_page.draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()


def test_samples_are_compared_of_the_same_noise_and_of_other_seeds(tmp_path, monkeypatch):
    cfg = load_config("configs/digits.yaml", [*TINY, "sample.steps=3", "sample.guidance_scale=0"])
    net = fp8_quality.build_model(cfg).eval().requires_grad_(False)
    features = ClassifierFeatures(Classifier((8, 8), 10).eval(), torch.device("cpu"))
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    real = extract(
        Images("noise", 40, lambda parts: (noise[p.start : p.stop] for p in parts)), features, progress=False
    )
    monkeypatch.setattr(fp8_quality, "yardstick", lambda *_: (features, real))
    monkeypatch.setattr(fp8_quality, "find_weights", lambda run: tmp_path / "ema.safetensors")
    keep = [FP8_KEEP, ("in_blocks.0", "out_blocks.-1")]
    args = argparse.Namespace(samples=40, seeds=2, batch=20, cache=tmp_path, pictures=tmp_path, keep=keep)
    rows = Rows("fp8_quality", tmp_path)
    fp8_quality.quality(rows, fp8_quality.Network("digits, 0 steps", cfg, net, None), "run", args)
    found = Results(tmp_path)

    default = fp8_page.provider_of(FP8_KEEP)

    def figure(who, metric, seed=1):
        return fp8_page.value(found, f"digits, 0 steps: samples, seed {seed}", who, metric)

    assert 0 < figure(default, "pixels from bf16") < 0.2 * figure("ours", "pixels from bf16")
    assert figure(default, "digits-fid to bf16") < 0.2 * figure("ours", "digits-fid to bf16")
    assert 0 <= figure("ours", "class_accuracy", 0) <= 1
    text = fp8_page.tables(found)
    both = [figure(default, "digits-fid", seed) - figure("ours", "digits-fid", seed) for seed in (0, 1)]
    assert f"| {sum(both) / 2:+.3f} |" in text and "| digits, 0 steps, 40 samples, bf16 |" in text
    assert "\n| FP8 but `in_blocks.0` `out_blocks.-1` |" in text
    assert (tmp_path / "fp8_digits.png").is_file()


def test_the_page_is_what_the_committed_rows_say():
    assert fp8_page.PAGE.read_text() == fp8_page.page(), "run `python -m benchmarks.fp8_quality`"
