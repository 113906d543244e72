"""What a run shows and leaves behind."""

import contextlib
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from tests.training import tiny
from uvit_fast.build import build_model
from uvit_fast.config import load_config
from uvit_fast.training import monitor
from uvit_fast.training.monitor import Monitor, forward_flops


def row(step: int, loss: float = 0.5) -> dict[str, float]:
    return {"step": step, "loss": loss, "images_per_second": 1234.5}


def run(watch: Monitor, steps: int) -> None:
    for step in range(1, steps + 1):
        watch.advance(step)
        watch.row(row(step))
    watch.close()


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    """Also one that reports no size, as some containers' do."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run(Monitor(tmp_path, 0, 3), 3)
    text = ""
    with contextlib.suppress(OSError):  # all has been read, and nobody writes any more
        while part := os.read(ours, 100_000):
            text += part.decode()
    os.close(ours)
    assert "3/3" in text and "loss 0.5000  1234 images/s" in text


def test_a_file_gets_lines_now_and_then(tmp_path, capsys, monkeypatch):
    """The first row, then one line each SECONDS_BETWEEN_LINES, and the end."""
    for name in ("slow", "fast"):
        (tmp_path / name).mkdir()
    run(Monitor(tmp_path / "slow", 0, 100), 50)
    assert len(capsys.readouterr().err.splitlines()) == 2
    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_LINES", 0.0)
    run(Monitor(tmp_path / "fast", 0, 100), 50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 40
    assert lines[-1].startswith("step 50/100  loss 0.5000  1234 images/s") and lines[-1].endswith(" left")


def test_rows_of_a_lost_continuation_are_dropped(tmp_path):
    """Killed at step 5, continued from the checkpoint of step 3; the last line was cut short."""
    run(Monitor(tmp_path, 0, 5), 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    watch = Monitor(tmp_path, 3, 5)
    watch.row(row(4, loss=0.25))
    watch.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 0.25


def test_a_board_that_could_not_write_is_replaced(tmp_path, monkeypatch, capsys):
    """TensorBoard's writer never writes again after an error."""
    plain, calls = SummaryWriter.add_scalar, []

    def full_at_first(board, *args):
        calls.append(board)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        plain(board, *args)

    monkeypatch.setattr(SummaryWriter, "add_scalar", full_at_first)
    run(Monitor(tmp_path, 0, 3), 3)
    assert "step 1: not written to" in capsys.readouterr().err
    assert len(set(calls)) == 2 and len(calls) == 1 + 2 * 2  # two scalars in each of the other rows
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


def test_wandb_gets_the_rows_where_it_is_asked_for(tmp_path, monkeypatch):
    """A stand-in for the package; continued, it is the same run. Without the package the error names the extra."""
    log, ids = [], []

    def init(**options):
        ids.append(options["id"])
        assert options["resume"] == "allow" and options["config"] == {"name": "tiny"}
        return SimpleNamespace(log=lambda row, step: log.append((step, row)), finish=lambda: log.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start in (0, 2):
        run(Monitor(tmp_path, start, 4, {"name": "tiny"}), 2)
    assert log[:3] == [(1, {"loss": 0.5, "images_per_second": 1234.5}), (2, log[1][1]), "finished"]
    assert ids[0] == ids[1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"train.wandb needs wandb: pip install -e \"\.\[wandb\]\""):
        Monitor(tmp_path, 0, 1, {})


def test_flops_are_those_of_the_matrix_products():
    """By hand: first, three blocks and last, 2 a multiply-add; and within 2% of the paper's 133.2 GMACs for H/2."""
    assert forward_flops(tiny.TinyModel(dim=23), tiny.config()) == 2 * (17 * 23 + 3 * 23 * 23 + 23 * 16)
    cfg = load_config("configs/h2_256.yaml")
    with torch.device("meta"):
        model = build_model(cfg)
    assert forward_flops(model, cfg) == pytest.approx(2 * 133.2e9, rel=0.02)
