"""The loss of held-out items is the training's own at fixed times and noise, on any number of ranks, and is written."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training import tiny
from uvit_fast.diffusion.noise import Draws
from uvit_fast.diffusion.objective import Objective
from uvit_fast.runtime.processes import World
from uvit_fast.training import held_out
from uvit_fast.training.checkpoint import held_out_but_seen
from uvit_fast.training.held_out import TIMES, HeldOut
from uvit_fast.training.trainer import Trainer, conditions_of

HELD = 150  # three batches of which the last is small: two ranks have unequal shares


@torch.no_grad()
def by_hand(network):
    """One number after the other: the mean error over items and times, of the items' own conditions."""
    data, objective, total = tiny.Points(HELD), Objective(tiny.Schedule()), 0.0
    for number in range(3):
        items = [(i, 0) for i in range(64 * number, min(64 * number + 64, HELD))]
        draws = Draws(torch.Generator().manual_seed(number))
        batch = data.finish(data.__getitems__(items), draws)
        for t in (1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16):
            noise = draws.randn(len(items), *tiny.IMAGE)
            task = objective.at(batch["x"], noise, torch.full((len(items),), t))
            total += (network(task.x_t, task.time, y=batch["y"]) - noise).square().mean((1, 2, 3)).double().sum()
    return float(total) / (HELD * 8)


def trained(run_dir, cfg):
    run = Trainer(cfg, tiny.TinyModel(), Objective(tiny.Schedule()), tiny.Points(), run_dir, held_out=tiny.Points(HELD))
    run.train()
    return run.step


def config(**train):
    cfg = tiny.config(iterations=5, ema_decay=0.5, warmup_steps=0, **train)
    return cfg.model_validate({**cfg.model_dump(), "evaluate": {"every": 2, "held_out": HELD}})


@pytest.mark.parametrize("ranks, settings", [(1, {}), (2, {"zero_stage": 3})])
def test_it_is_that_of_the_ema_weights_every_so_many_steps_and_at_the_end(ranks, settings, tmp_path):
    tiny.launch(trained, tmp_path, config(checkpoint_every=1, keep_checkpoints=9, **settings), ranks=ranks)
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    network = tiny.TinyModel()
    for row in rows:
        network.load_state_dict(load_file(tmp_path / f"checkpoints/step_0000000{row['step']}/ema.safetensors"))
        assert row["held_out_loss"] == pytest.approx(by_hand(network), rel=1e-6)
    board = EventAccumulator(str(tmp_path)).Reload().Scalars("evaluation/held_out_loss")
    assert [event.step for event in board] == [2, 4, 5]
    best = min(rows, key=lambda row: row["held_out_loss"])
    assert json.loads((tmp_path / "best" / "figures.json").read_text()) == best


def test_two_looks_see_the_same_noise_and_a_weight_of_the_objective_counts():
    cfg, data = config(), tiny.Points(HELD)
    objective = Objective(tiny.Schedule(), min_snr=5.0)

    def error(network, batch, noise, t):
        return objective.loss_at(network, batch["x"], noise, t, **conditions_of(cfg, batch))

    world = World(alone=True, device=torch.device("cpu"))
    measure = HeldOut(data, error, world, 0)
    losses = [measure.loss(tiny.TinyModel(seed=seed), bool) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] < by_hand(tiny.TinyModel()) - 0.1  # whose error counts in full at t near 1 and 0
    assert HeldOut(data, error, world, 0).loss(tiny.TinyModel(), lambda: True) is None  # given up


def test_the_times_are_the_middles_of_eighths():
    assert held_out.BATCH == 64 and TIMES == tuple((2 * i + 1) / 16 for i in range(8))


@pytest.mark.parametrize(
    "before, now, seen",
    [(None, 100, 100), (200, 100, 0), (100, 200, 100), ("elsewhere", 100, 100), (100, "elsewhere", 0), (100, None, 0)],
)
def test_a_run_that_goes_on_says_how_many_it_has_trained_on_before(before, now, seen):
    """Of two numbers the less are among the more; a path is other data."""
    before, now = ({"evaluate": held and {"every": 1, "held_out": held}} for held in (before, now))
    assert held_out_but_seen(now, {"config": before}) == seen
