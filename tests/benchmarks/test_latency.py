"""What a process spends before and on its first image is told part by part; rows stay when a later case fails."""

import functools
import json
import sys
import time

import pytest
import torch

from benchmarks import autoencoders, bench_latency, first_image
from tests.recorded import RecordedGraphs
from uvit_fast import runtime
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model import fp8
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.sampling import captured, weights

SMALL = ["model.embed_dim=64", "model.num_heads=1", "model.depth=2", "model.img_size=8", "sample.steps=2"]


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Return what the process tells, run in this one: of a small network and a small autoencoder."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench_latency, "kl", functools.partial(autoencoders.kl, channels=(32, 32)))
    settings = bench_latency.settings(str(tmp_path), SMALL)
    bench_latency.prepare(["S"], str(tmp_path), settings)
    monkeypatch.setenv(first_image.BEGAN, str(time.time()))
    command = ["--config", "s2_cifar10", "--checkpoint", f"{tmp_path}/S.safetensors", "--images", "2"]
    command += [word for each in settings for word in ("--set", each)]

    def run(*more):
        first_image.main([*command, *more])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def as_on_a_gpu(monkeypatch, graphs):
    """Let calls and loops be captured by `graphs`, and e4m3 products be PyTorch's."""
    monkeypatch.setattr(runtime.graphs, "CudaGraphs", graphs)
    monkeypatch.setattr(captured, "CudaGraphs", graphs)
    monkeypatch.setattr(captured, "on_a_gpu", lambda model, decode: captured.GraphSampler(model, decode))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(weights, "check_precision", lambda cfg, device: None)
    monkeypatch.setattr(fp8, "Fp8UViT", lambda net, keep: Fp8UViT(net.to(torch.bfloat16), fp8_block.REFERENCE, keep))


def test_an_image_is_drawn_and_its_parts_are_told(told):
    found = told()
    assert list(found["parts"]) == ["python", "import", "device", "weights", "autoencoder", "image"]
    assert len(found["images"]) == 2
    assert all(seconds > 0 for seconds in [*found["parts"].values(), *found["images"]])


def test_a_gpus_parts_are_told_apart_and_later_images_replay_a_loop(told, monkeypatch):
    """In FP8; recordings stand for CUDA graphs."""
    as_on_a_gpu(monkeypatch, RecordedGraphs)
    found = told("--precision", "fp8")
    before, after = ["python", "import", "device", "weights"], ["autoencoder", "kernels", "capture", "image"]
    assert list(found["parts"]) == [*before, "rounding", *after] and len(found["images"]) == 2


def test_a_loop_that_is_not_captured_is_no_result(told, monkeypatch):
    class Refusing(RecordedGraphs):
        def capture(self, run, pool=None):
            raise RuntimeError("out of memory")

    as_on_a_gpu(monkeypatch, Refusing)
    with (
        pytest.warns(RuntimeWarning, match="uncaptured"),
        pytest.raises(SystemExit, match="expected one captured loop"),
    ):
        told()


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
