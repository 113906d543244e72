"""The training benchmark measures the cases that it is asked for, and a step runs as its provider's name says."""

import csv
import sys

import pytest

from benchmarks import bench_training, precompile

TINY = ["model.embed_dim=64", "model.num_heads=1", "model.depth=2", "model.img_size=8"]


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--out", str(folder), *arguments])
    bench_training.main()
    with open(folder / "training.csv", newline="") as file:
        return [(row["case"], row["provider"]) for row in csv.DictReader(file) if row["metric"] == "img_per_s"]


def test_an_uncaptured_step_is_measured_beside_the_same_batchs_peers(monkeypatch, tmp_path):
    """The preset, on a CPU, where compilation would take a minute."""
    monkeypatch.setattr(bench_training, "STEPS", 1)
    monkeypatch.setattr(bench_training, "WARMUP", 0)
    overrides = [word for each in TINY for word in ("--set", each)]
    asked = ["--cases", "uncaptured", "--providers", "ours-uncaptured,eager", "--sizes", "H", *overrides]
    wanted = [("H:16:none", "ours-uncaptured"), ("H:16:none", "eager")]
    assert run(monkeypatch, tmp_path, *asked) == wanted
    monkeypatch.setattr(bench_training, "rows_of", lambda *_: pytest.fail("measured twice"))
    assert run(monkeypatch, tmp_path, "--missing", *asked) == wanted


@pytest.mark.parametrize("provider", ["ours", "ours-uncaptured"])
def test_whether_a_step_is_captured_is_in_its_name(provider):
    cfg = bench_training.config("H", provider, 16, "cpu", TINY)
    assert cfg.train.cuda_graphs == (provider == "ours") and cfg.train.batch_size == 16


def test_patterns_and_presets_choose_and_one_that_fits_nothing_is_named(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--cases", "main,H:none:ours")
    assert "--cases: expected main, all, uncaptured or patterns of H:128:none:ours" in capsys.readouterr().err


def test_what_the_cases_need_is_compiled_before():
    sizes = ["S", "M", "L", "H", "USiT"]
    there = {(job.size, job.batch, job.policy, job.provider) for job in precompile.jobs(sizes, ["training"])}
    for case in (*bench_training.MAIN, *bench_training.UNCAPTURED):
        size, batch, policy, provider = case.split(":")
        compiled = (size, int(batch), policy, provider.removesuffix("-uncaptured"))
        assert provider == "eager" or compiled in there
