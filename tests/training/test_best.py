"""Evaluation while training: figures of the EMA weights are written, and the best weights stay."""

import json
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from uvit_fast import cli
from uvit_fast.training.best import Best

SMALL = ["model.embed_dim=32", "model.depth=2", "sample.steps=2", "train.iterations=4", "device=cpu"]
MEASURED = ["evaluate.every=2", "evaluate.samples=24", "evaluate.features=digits-fid", "evaluate.held_out=50"]


def test_the_best_weights_stay_and_worse_ones_change_nothing(tmp_path):
    best, a, b = Best(tmp_path), {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert best.offer(a, {"fid": 3.0, "kid": 0.1}, 10)
    assert not best.offer(b, {"fid": 3.5, "kid": 0.0}, 20)
    assert not best.offer(b, {"fid": float("nan"), "kid": 0.0}, 25)
    assert Best(tmp_path).offer(b, {"fid": 2.0, "kid": 0.2}, 30)  # a continued run knows what was best
    assert torch.equal(load_file(tmp_path / "best" / "ema.safetensors")["w"], b["w"])
    assert json.loads((tmp_path / "best" / "figures.json").read_text()) == {"step": 30, "fid": 2.0, "kid": 0.2}
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["ema.safetensors", "figures.json"]
    assert best.offer(a, {"digits-fid": 9.0}, 40)  # another figure: nothing to compare with
    for damaged in ("", "[]", '{"digits-fid": "low"}'):  # as after a power cut
        (tmp_path / "best" / "figures.json").write_text(damaged)
        assert best.offer(a, {"digits-fid": 9.0}, 50)


def test_a_full_disk_is_an_error_of_the_system_which_a_run_survives(tmp_path):
    """Not one of safetensors' own, which nobody waits for."""
    best, weights = Best(tmp_path), {"w": torch.zeros(10_000)}
    best.offer(weights, {"fid": 3.0}, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="ema.safetensors"):
            best.offer(weights, {"fid": 2.0}, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal_before)
    assert json.loads((tmp_path / "best" / "figures.json").read_text())["step"] == 10
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["ema.safetensors", "figures.json"]


def test_train_measures_samples_and_the_loss_of_held_out_images_every_so_many_steps(
    digits_classifier, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "uvit-fast").mkdir(parents=True)
    shutil.copy(digits_classifier, tmp_path / "cache" / "uvit-fast")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    options = [option for value in [*SMALL, *MEASURED] for option in ("--set", value)]
    assert cli.main(["train", "--config", "digits", "--run-dir", str(tmp_path / "run"), *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(row["digits-fid"] > 0 for row in rows)
    assert 0 < rows[1]["held_out_loss"] < rows[0]["held_out_loss"]
    best = json.loads((tmp_path / "run" / "best" / "figures.json").read_text())
    assert best == min(rows, key=lambda row: row["digits-fid"])
    assert "step 4: digits-fid" in capsys.readouterr().err
