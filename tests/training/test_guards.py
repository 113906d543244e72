"""What may go wrong in a run, and what the run then does."""

import contextlib
import io
import json
import os
import re
import resource
import time

import pytest
import torch

from tests.training import tiny
from tests.training.test_trainer import STEPS, config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import read_rows
from uvit_fast.training import checkpoint
from uvit_fast.training.monitor import Reading


def poisoned(run_dir, cfg, bad_steps, late_rank=None):
    """Train with a loss that is not a number in some steps; the weights before and after the first of them, and the
    rows.

    On `late_rank` scalars arrive when they are waited for, as they may on a device.
    """
    if os.environ["RANK"] == str(late_rank):
        Reading.ready = lambda self: False
    trainer = tiny.trainer(run_dir, cfg)
    loss, step, seen = trainer.loss, trainer._step, []

    def bad_loss(raw, number, k):
        return loss(raw, number, k) * (float("nan") if number in bad_steps else 1.0)

    def watched(stream):
        step(stream)
        parts = [trainer.engine.partition, *trainer.engine.moments().values(), trainer.engine.ema.values]
        seen.append([part.detach().clone() for part in parts])

    trainer.loss, trainer._step = bad_loss, watched
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    finally:
        torch.distributed.barrier()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return seen, rows


@pytest.mark.parametrize("how, ranks", [({}, 1), ({"zero_stage": 3}, 2), ({"offload_optimizer": True}, 1)], ids=str)
def test_a_step_without_a_finite_gradient_changes_nothing(how, ranks, tmp_path):
    """Neither weights nor moments nor averages; the run goes on and says what it did."""
    seen, rows = tiny.launch(poisoned, tmp_path, config(iterations=6, **how), {3}, ranks=ranks)
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3]))
    assert not any(torch.equal(a, b) for a, b in zip(seen[3], seen[4]))
    assert [row.get("refused", 0) for row in rows] == [0, 0, 0, 1, 0, 0]
    assert all(row["loss"] == row["loss"] for i, row in enumerate(rows) if i != 3)


@pytest.mark.parametrize("ranks, late_rank", [(1, None), (2, 0)])
def test_a_run_without_finite_gradients_ends(ranks, late_rank, tmp_path):
    """On every rank at the same step, though one sees the losses later than the other."""
    settings = {"iterations": 60, "checkpoint_every": 5, "max_refused": 7, "log_every": 2}
    message = tiny.launch(poisoned, tmp_path, config(**settings), set(range(10, 60)), late_rank, ranks=ranks)
    assert re.match(r"step 1[89]: loss or gradient not finite for [89] steps in a row", message)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step_00000005", "step_00000010"]  # none of what was refused, which would push these out


def test_steps_in_a_row_are_counted_within_a_row_of_scalars_too(tmp_path):
    cfg = config(iterations=20, max_refused=4, log_every=20)
    assert "not finite for 4 steps in a row" in tiny.launch(poisoned, tmp_path, cfg, {7, 8, 9, 10})


def on_a_full_disk(run_dir, cfg):
    """Nothing can be written any more, to a file of ours or of TensorBoard's, once the run has begun; then its rows."""
    trainer = tiny.trainer(run_dir, cfg)
    step = trainer._step

    def filling(stream):
        step(stream)
        if trainer.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        if trainer.step == 12:  # somebody makes room
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if trainer.step > 3:
            time.sleep(0.2)  # TensorBoard's thread may write

    trainer._step = filling
    with contextlib.redirect_stderr(io.StringIO()) as said:
        trainer.train()
    return said.getvalue(), [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]


def test_a_full_disk_costs_rows_and_checkpoints_not_the_run(tmp_path):
    said, rows = tiny.launch(on_a_full_disk, tmp_path, config(checkpoint_every=2))
    assert "checkpoint of step 6 was not written" in said and "step 5: not written to" in said
    assert rows[:2] == [1, 2] and set(range(14, 21)) <= set(rows) and not {6, 7, 8} & set(rows)
    assert checkpoint.newest_intact(tmp_path / "checkpoints", pytest.fail)[1]["step"] == STEPS
    assert "Traceback" not in said and len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def spiked(run_dir, cfg, bad_step):
    """Train where the samples of one step are a hundred times too large; their indices, and the run's spikes."""
    trainer = tiny.trainer(run_dir, cfg)
    loss, seen = trainer.loss, []

    def bad_loss(raw, number, k):
        return loss({**raw, "x": raw["x"] * 100} if number == bad_step else raw, number, k)

    def watched(stream):
        trainer.dataset.seen.clear()
        step(stream)
        if trainer.step == bad_step + 1:
            seen.extend(i for i, _ in trainer.dataset.seen)

    step, trainer.loss, trainer._step = trainer._step, bad_loss, watched
    trainer.train()
    return seen, [json.loads(line) for line in (run_dir / "spikes.jsonl").read_text().splitlines()]


def test_a_loss_spike_names_its_samples(tmp_path):
    """In the middle of a row, where the row's mean would hide the step."""
    cfg = config(iterations=80, log_every=20, micro_batch_size=4, lr=1e-4)
    seen, spikes = tiny.launch(spiked, tmp_path, cfg, 66)
    assert [spike["step"] for spike in spikes] == [67]
    assert spikes[0]["samples"] == seen and len(seen) == 8
    assert spikes[0]["loss"] > spikes[0]["mean"] + 6 * spikes[0]["deviation"]


def fails_to_preview(run_dir, cfg):
    def preview(model, step, folder):
        raise UserError("no decoder")

    try:
        tiny.trainer(run_dir, cfg, preview).train()
    except UserError as error:
        return str(error)


def test_what_fails_after_the_last_step_does_not_take_it_along(tmp_path):
    """Every rank ends with the mistake that one of them met."""
    assert tiny.launch(fails_to_preview, tmp_path, config(iterations=4, sample_every=4), ranks=2) == "no decoder"
    assert checkpoint.newest_intact(tmp_path / "checkpoints", pytest.fail)[1]["step"] == 4
