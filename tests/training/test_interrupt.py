"""Signals while a run waits for something else than its own step, and a launcher that has gone."""

import os
import signal
import time
from unittest import mock

import pytest

from tests.training import tiny
from tests.training.test_trainer import STEPS, config
from uvit_fast.training import interrupt, trainer
from uvit_fast.training.monitor import Monitor


class Stalls(tiny.Points):
    """From some sample of the first epoch on there are none for ever; the process that reads it gets a SIGTERM."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def __getitems__(self, items):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        return super().__getitems__(items)


def stalled(run_dir, cfg, rank, after):
    """Train where one rank's data stalls; the step where the run ended, and the seconds that it took."""
    interrupt.GRACE = trainer.GRACE = 1
    run = tiny.trainer(run_dir, cfg)
    if run.world.rank == rank:
        run.dataset = Stalls(after)
    began = time.monotonic()
    return run.train()["step"], time.monotonic() - began


@pytest.mark.parametrize(
    "ranks, rank, after, how",
    [(1, 0, 7, {}), (2, 1, 3, {"checkpoint_every": 4}), (2, 0, STEPS - 1, {}), (2, 1, 5, {"zero_stage": 3})],
    ids=["alone, within a step", "where a checkpoint is due", "in the last step", "ZeRO-3"],
)
def test_a_signal_while_the_data_stalls_saves_the_last_whole_step(ranks, rank, after, how, tmp_path):
    """With others, these take the step back too; what continues is the run that was never stopped."""
    whole = tiny.launch(tiny.train, tmp_path / "whole", config(**how), ranks=ranks)
    ended, seconds = tiny.launch(stalled, tmp_path / "run", config(**how), rank, after, ranks=ranks)
    assert ended == after // (3 - ranks) and seconds < 10
    continued = tiny.launch(tiny.train, tmp_path / "run", config(**how), ranks=ranks)
    assert continued["first_step"] == ended
    assert continued["losses"] == whole["losses"]
    assert not any("refused" in row for row in continued["rows"])


def interrupted_look(run_dir, cfg):
    interrupt.GRACE = 1

    def preview(model, step, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)

    return tiny.trainer(run_dir, cfg, preview).train()["step"]


def test_a_signal_during_a_preview_saves_and_ends_the_run(tmp_path):
    assert tiny.launch(interrupted_look, tmp_path, config(sample_every=3), ranks=2) in (3, 4, 5)
    assert tiny.launch(tiny.train, tmp_path, config(), ranks=2)["first_step"] in (3, 4, 5)


def unheard(run_dir, cfg, number):
    """Train with nobody at the other end of stderr, and send this process a signal at step 5."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    row = Monitor.row

    def with_signal(self, scalars):
        row(self, scalars)
        if scalars["step"] == 5:
            os.kill(os.getpid(), number)

    with mock.patch.object(Monitor, "row", with_signal):
        return tiny.trainer(run_dir, cfg).train()["step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_saves_though_its_terminal_or_tee_has_gone(number, tmp_path):
    """Ctrl-C reaches `| tee` too, and who closes a terminal takes it from the run before the run has ended."""
    ended = tiny.launch(unheard, tmp_path, config(), number)
    assert ended in (5, 6)
    assert (tmp_path / "checkpoints" / f"step_{ended:08d}").exists()


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "a script's background job"])
def test_what_the_parent_ignores_stays_ignored(ignored):
    with mock.patch("signal.getsignal", lambda number: signal.SIG_IGN if number == ignored else None):
        assert set(interrupt.heeded()) == set(interrupt.SIGNALS) - {ignored}
