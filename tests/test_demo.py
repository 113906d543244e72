"""`make demo`, cut short: the commands fit together, write what they promise, and a bad result is said to be bad."""

import json
import shutil

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training import tiny
from uvit_fast import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Thirty steps of the digits config."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    command = ["train", "--config", "digits", "--run-dir", str(folder)]
    for override in ("train.iterations=30", "train.log_every=10", "train.sample_every=30", "sample.steps=2"):
        command += ["--set", override]
    assert tiny.launch(cli.main, command) == 0
    return folder


def test_the_run_shows_a_preview_of_its_ema_samples(run):
    """As a file and in TensorBoard, beside the scalars."""
    board = EventAccumulator(str(run)).Reload()
    assert board.Tags()["images"] == ["samples"] and [e.step for e in board.Images("samples")] == [30]
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= set(board.Tags()["scalars"])
    assert Image.open(run / "samples" / "step_00000030.png").width > 8 * 40


def test_undertrained_samples_are_measured_and_fail(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "digits")
    assert cli.main(["demo", "--run-dir", str(folder)]) == 1
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["class_accuracy"] < 0.5  # thirty steps give noise
    assert metrics["train_seconds"] > 0 and metrics["images_per_second"] > 0 and metrics["nearest_train_ratio"] > 0.5
    assert Image.open(folder / "samples.png").height > 10 * 40
    assert "do not reach" in capsys.readouterr().out


def test_demo_refuses_another_run(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "digits")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("name: digits\n  path", "name: synthetic\n  path"))
    assert cli.main(["demo", "--run-dir", str(folder)]) == 2
    assert "expected a run with data.name digits, got synthetic" in capsys.readouterr().err
