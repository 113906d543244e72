"""What a process spends before and on its first image is told part by part; rows stay when a later case fails."""

import functools
import json
import sys
import time

import pytest

from benchmarks import bench_latency, bench_sampling, first_image

SMALL = ["model.embed_dim=64", "model.num_heads=1", "model.depth=2", "model.img_size=8", "sample.steps=2"]


def test_an_image_is_drawn_and_its_parts_are_told(tmp_path, monkeypatch, capsys):
    """A small network and a small autoencoder, in this process."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench_latency, "kl", functools.partial(bench_sampling.kl, channels=(32, 32)))
    settings = bench_latency.settings(str(tmp_path), SMALL)
    bench_latency.prepare(["S"], str(tmp_path), settings)
    monkeypatch.setenv(first_image.BEGAN, str(time.time()))
    command = ["--config", "s2_cifar10", "--checkpoint", f"{tmp_path}/S.safetensors", "--images", "2"]
    first_image.main([*command, *(word for each in settings for word in ("--set", each))])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(told["parts"]) == ["python", "import", "device", "weights", "autoencoder", "image"]
    assert len(told["images"]) == 2
    assert all(seconds > 0 for seconds in [*told["parts"].values(), *told["images"]])


def test_one_image_is_of_50_evaluations_without_guidance():
    from benchmarks import models
    from uvit_fast.build import build_sampler

    for size in ("H", "S"):
        cfg = models.config(size, "ours", overrides=bench_latency.settings("folder", []))
        stages = build_sampler(cfg).stages
        assert cfg.sample.guidance_scale == 0 and len(stages) == 50


def test_a_case_that_fails_is_named_and_the_others_are_written(tmp_path, monkeypatch, capsys):
    def started(size, provider, folder, more, images, cold):
        if size == "H":
            raise RuntimeError("ended with 1")
        return {"parts": {"python": 1.0, "import": 2.0}, "images": [80.0] * images}

    monkeypatch.setattr(bench_latency, "started", started)
    monkeypatch.setattr(bench_latency, "prepare", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--providers", "ours", "--starts", "2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: H:ours"):
        bench_latency.main()
    lines = (tmp_path / "latency.csv").read_text().splitlines()[1:]
    assert [line.split(",")[6] for line in lines] == ["latency:S", "start:S", "start:S:python", "start:S:import"]
    assert [line.split(",")[-2] for line in lines] == ["80", "3", "1", "2"]
    assert "H:ours: not measured: ended with 1" in capsys.readouterr().out
