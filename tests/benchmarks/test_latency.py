"""What a process spends before and on its first image is told part by part."""

import functools
import json
import time

import pytest

from benchmarks import bench_latency, bench_sampling


def test_an_image_is_drawn_and_its_parts_are_told(tmp_path, monkeypatch, capsys):
    """A small network and a small autoencoder, in this process."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench_sampling, "kl", functools.partial(bench_sampling.kl, channels=(32, 32)))
    small = ["model.embed_dim=64", "model.num_heads=1", "model.depth=2", "model.img_size=8", "sample.steps=2"]
    bench_latency.prepare(["S"], tmp_path, bench_latency.settings(str(tmp_path), small))
    monkeypatch.setenv(bench_latency.CHILD, str(time.time()))
    bench_latency.child("S", "bf16", str(tmp_path), small, images=1)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(told["parts"]) == ["python", "import", "device", "weights", "autoencoder", "image"] and len(told["images"]) == 1
    assert all(seconds > 0 for seconds in [*told["parts"].values(), *told["images"]])
