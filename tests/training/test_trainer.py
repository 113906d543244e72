"""The training loop: what is computed, and that neither interruption nor sharding changes it."""

import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from tests.training import tiny
from uvit_fast.config import UserError, load_config
from uvit_fast.diffusion.noise import Draws
from uvit_fast.files import read_rows
from uvit_fast.training import checkpoint, engine
from uvit_fast.training.engine import batch_plan, start
from uvit_fast.training.loader import Order, batches
from uvit_fast.training.monitor import Reading
from uvit_fast.training.row import Row
from uvit_fast.training.trainer import Trainer, mix

STEPS = 20


def config(**train):
    """Micro-batches of 4 in a batch of 8: two accumulated passes on one rank, or one pass on each of two."""
    return tiny.config(**{"iterations": STEPS, "micro_batch_size": 4, **train})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, never interrupted."""
    return tiny.launch(tiny.train, tmp_path_factory.mktemp("whole"), config())


def test_resume_is_exact(whole, tmp_path):
    """Half of the steps, then the others in a new process: the same losses, weights and averages, bit for bit."""
    tiny.launch(tiny.train, tmp_path, config(iterations=STEPS // 2))
    continued = tiny.launch(tiny.train, tmp_path, config())
    assert continued["first_step"] == STEPS // 2
    assert continued["losses"] == whole["losses"]
    for name, weight in whole["weights"].items():
        assert torch.equal(continued["weights"][name], weight)
        assert torch.equal(continued["ema"][name], whole["ema"][name])


def rows_of_one_and_of_many():
    """A loss of each of 64 steps over all ranks: in rows of one step, and in one row."""
    world = start(config())
    generator = torch.Generator().manual_seed(world.rank)
    losses = torch.rand(64, generator=generator)

    def over_ranks(first, last):
        row = Row(first, last - first, world.device)
        for step in range(first, last):
            row.add_loss(step, losses[step])
        return row.over_ranks(last)

    return torch.cat([over_ranks(step, step + 1) for step in range(64)], 1), over_ranks(0, 64)


def test_a_loss_does_not_depend_on_the_row_it_is_logged_in():
    """Or a continued run's would differ in their last bits; with two ranks there is one order to add in, with four there are more."""
    single, together = tiny.launch(rows_of_one_and_of_many, ranks=4)
    assert torch.equal(single, together)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_follow_one_process(stage, whole, tmp_path):
    """Losses, weights and averages under each ZeRO stage; every parameter's size is odd, so that partitions are padded."""
    sharded = tiny.launch(tiny.train, tmp_path, config(zero_stage=stage), ranks=2)
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sharded["ema"][name], whole["ema"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_follows_one_process_and_resumes(stage, whole, tmp_path):
    """Master weights, moments and averages in the host's memory; two ranks, stopped once."""
    offloaded = dict(zero_stage=stage, offload_optimizer=True)
    tiny.launch(tiny.train, tmp_path, config(iterations=STEPS // 2, **offloaded), ranks=2)
    continued = tiny.launch(tiny.train, tmp_path, config(**offloaded), ranks=2)
    assert continued["first_step"] == STEPS // 2
    assert continued["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name, average in whole["ema"].items():
        torch.testing.assert_close(continued["ema"][name], average, rtol=1e-4, atol=1e-5)


def test_resume_on_other_ranks_and_stage(whole, tmp_path):
    """Two ranks under ZeRO-3, then one under ZeRO-2, then four under ZeRO-3: still the same run, though with other micro-batches."""
    third = STEPS // 3
    tiny.launch(tiny.train, tmp_path, config(iterations=third, zero_stage=3, micro_batch_size=None), ranks=2)
    tiny.launch(tiny.train, tmp_path, config(iterations=2 * third, zero_stage=2, micro_batch_size=None))
    continued = tiny.launch(tiny.train, tmp_path, config(zero_stage=3, micro_batch_size=None), ranks=4)
    assert continued["first_step"] == 2 * third
    assert continued["losses"] == pytest.approx(whole["losses"], rel=1e-4)


def averaged_by_hand(run_dir, cfg):
    """Train, and beside it average the whole weights after each step in fp64; (the trainer's averages, those)."""
    trainer = tiny.trainer(run_dir, cfg)
    plain = {name: w.double() for name, w in trainer.engine.gather(trainer.engine.partition).items()}
    step = trainer._step

    def both(stream):
        step(stream)
        for name, w in trainer.engine.gather(trainer.engine.partition).items():
            plain[name].mul_(cfg.train.ema_decay).add_(w.double(), alpha=1 - cfg.train.ema_decay)

    trainer._step = both
    trainer.train()
    return trainer.engine.gather(trainer.engine.ema.values), plain


@pytest.mark.parametrize("stage, ranks", [(1, 2), (2, 2), (3, 2), (3, 1)])
def test_ema_is_exact(stage, ranks, tmp_path):
    """The average of partitions is the average of the weights: 50 steps, against a plain one in fp64."""
    cfg = config(iterations=50, zero_stage=stage, micro_batch_size=None, checkpoint_every=100, log_every=50)
    ours, plain = tiny.launch(averaged_by_hand, tmp_path, cfg, ranks=ranks)
    assert ours.keys() == tiny.TinyModel().state_dict().keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-6, atol=1e-6)


def test_checkpoint_holds_the_ema_under_the_models_names(tmp_path):
    result = tiny.launch(tiny.train, tmp_path, config(iterations=3, zero_stage=3), ranks=2)
    saved = load_file(tmp_path / "checkpoints" / "step_00000003" / "ema.safetensors")
    tiny.TinyModel().load_state_dict(saved)
    assert all(torch.equal(saved[name], value) for name, value in result["ema"].items())


def with_network(cfg, network, dataset=None, null_context=None):
    """What of a trainer its loss looks at, with this network for the engine."""
    return SimpleNamespace(
        config=cfg,
        world=SimpleNamespace(rank=0, size=1),
        dataset=dataset or tiny.Points(),
        schedule=tiny.Schedule(),
        engine=network,
        generator=torch.Generator(),
        null_context=null_context,
    )


class Answering:
    """A network that gives one answer, and remembers what it was asked."""

    micro_batch = 4

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x_t, t, **conditions):
        self.x_t, self.t, self.conditions = x_t, t, conditions
        return self.answer


def test_the_loss_is_the_error_of_the_predicted_noise():
    """0 for who predicts it; the noised image and its time are those of u; all drawn in the order that continued runs rely on: for the
    whole batch of 8, of which the second micro-batch has the last four.
    """
    dataset, items = tiny.Points(), [(i, 0) for i in range(8)]
    draws = Draws(torch.Generator().manual_seed(mix(0, 5)))
    x_0, u, noise = dataset.finish(dataset.__getitems__(items), draws)["x"], draws.rand(8), draws.randn(8, *tiny.IMAGE)
    x_t, t = tiny.Schedule().add_noise(x_0, noise, u)
    raw, knowing = dataset.__getitems__(items[4:]), Answering(noise[4:])
    assert Trainer.loss(with_network(config(), knowing), raw, 5, 1) == 0
    assert torch.equal(knowing.x_t, x_t[4:]) and torch.equal(knowing.t, t[4:])
    guess = torch.full_like(noise[4:], 0.5)
    loss = Trainer.loss(with_network(config(), Answering(guess)), raw, 5, 1)
    assert loss.item() == pytest.approx((guess - noise[4:]).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("p_uncond", [0.0, 0.5, 1.0])
def test_conditions_are_dropped_with_their_probability(p_uncond):
    """For the null label, and for the features of the empty text."""
    items, many = [(i % 50, 0) for i in range(400)], torch.zeros(400, *tiny.IMAGE)
    raw, network = tiny.Points().__getitems__(items), Answering(many)
    cfg = config(p_uncond=p_uncond, batch_size=400)
    Trainer.loss(with_network(cfg, network), raw, 0, 0)
    dropped = network.conditions["y"] == 3
    assert torch.equal(network.conditions["y"][~dropped], raw["y"][~dropped])
    assert dropped.float().mean().item() == pytest.approx(p_uncond, abs=0.1 if p_uncond == 0.5 else 0)

    text = cfg.model.model_copy(update={"num_classes": 0, "context_dim": 5, "context_tokens": 2})
    raw["context"], null = torch.randn(400, 2, 5), torch.ones(2, 5)
    Trainer.loss(with_network(cfg.model_copy(update={"model": text}), network, null_context=null), raw, 0, 0)
    assert torch.equal(network.conditions["context"][dropped], null.expand(400, 2, 5)[dropped])
    assert torch.equal(network.conditions["context"][~dropped], raw["context"][~dropped])


def plain_loop(cfg, grad_clip=None):
    """Losses, gradient norms and weights of a loop in plain PyTorch over the batches of `config`."""
    dataset, model = tiny.Points(), tiny.TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), betas=cfg.train.betas, weight_decay=cfg.train.weight_decay)
    model.micro_batch = 4  # as the engine has it
    plain = with_network(cfg, model, dataset)
    raws = batches(dataset, Order(len(dataset), 0, 4, 2, 0, 1, 0, STEPS), 0, torch.device("cpu"))
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.01 * min(step / 3, 1)
        optimizer.zero_grad()
        pair = [Trainer.loss(plain, next(raws), step, k) for k in range(2)]
        sum(pair).div(2).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item())
        optimizer.step()
        losses.append(sum(loss.item() for loss in pair) / 2)
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def test_the_step_is_plain_adamw(whole):
    """Loss, warm-up from 0, accumulation, weight decay on all parameters."""
    losses, norms, _ = plain_loop(config())
    assert [row["grad_norm"] for row in whole["rows"]] == pytest.approx(norms, rel=1e-4)
    assert whole["losses"] == pytest.approx(losses, rel=1e-5)
    assert whole["rows"][0]["lr"] == 0 and whole["rows"][1]["lr"] == pytest.approx(0.01 / 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_clipping_is_by_the_global_norm(stage, tmp_path):
    """Against the plain loop, at a norm that some gradients exceed and others do not: AdamW would not notice a constant factor."""
    clipped = tiny.launch(tiny.train, tmp_path, config(zero_stage=stage, grad_clip=1.5), ranks=2)
    losses, norms, weights = plain_loop(config(), grad_clip=1.5)
    assert min(norms) < 1.3 and max(norms) > 2
    assert [row["grad_norm"] for row in clipped["rows"]] == pytest.approx(norms, rel=1e-4)
    assert clipped["losses"] == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(clipped["weights"][name], weight, rtol=1e-4, atol=1e-5)


def poisoned(run_dir, cfg, bad_steps, late_rank=None):
    """Train with a loss that is not a number in some steps; the weights before and after the first of them, and the rows.

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


def compiled(run_dir, cfg):
    """train.compile, without the minutes of a code generator."""
    plain, calls = nn.Module.compile, []

    def traced(module, **options):
        calls.append(options)
        plain(module, backend="aot_eager", **options)

    with mock.patch.object(nn.Module, "compile", traced):
        return tiny.train(run_dir, cfg)["losses"], len(calls)


def test_a_compiled_model_follows_the_plain_one(whole, tmp_path):
    losses, calls = tiny.launch(compiled, tmp_path, config(compile=True))
    assert calls == 1
    assert losses == pytest.approx(whole["losses"], rel=1e-5)


def signalled(run_dir, cfg, rank, number):
    """Train, and at step 5 send one rank a signal; the step where the run ended."""
    trainer = tiny.trainer(run_dir, cfg)
    step = trainer._step

    def with_signal(stream):
        step(stream)
        if trainer.step == 5 and trainer.world.rank == rank:
            os.kill(os.getpid(), number)

    trainer._step = with_signal
    return trainer.train()["step"]


@pytest.mark.parametrize("ranks, rank, number", [(1, 0, signal.SIGTERM), (1, 0, signal.SIGINT), (2, 1, signal.SIGUSR1)])
def test_a_signal_saves_and_ends_the_run(ranks, rank, number, whole, tmp_path):
    """Exit code 0 within a step or two, and the same command gives the run that was never stopped."""
    stopped = tiny.launch(signalled, tmp_path, config(), rank, number, ranks=ranks)
    assert 5 <= stopped <= 7
    continued = tiny.launch(tiny.train, tmp_path, config(), ranks=ranks)
    assert continued["first_step"] == stopped
    assert continued["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def late(run_dir, cfg):
    """Scalars arrive when they are waited for; a signal at step 5."""
    Reading.ready = lambda self: False
    return signalled(run_dir, cfg, 0, signal.SIGTERM)


def test_the_last_row_before_a_signal_is_written(tmp_path):
    assert tiny.launch(late, tmp_path, config()) == 5
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


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


def waits_for_the_first():
    """Two seconds and a half, where a collective gives up after one; then its result, and its mistake."""
    engine.dist.init_process_group = partial(torch.distributed.init_process_group, timeout=timedelta(seconds=1))
    world = start(config())

    def mistaken():
        raise UserError("expected more")

    answer = world.on_first(lambda: time.sleep(2.5) or "rank 0's")
    with pytest.raises(UserError, match="expected more"):
        world.on_first(mistaken)
    return answer


def test_ranks_wait_for_what_the_first_does_alone():
    assert tiny.launch(waits_for_the_first, ranks=2) == "rank 0's"


def test_previews_show_the_ema_weights(tmp_path):
    shown = tiny.launch(previewed, tmp_path, config(iterations=5, sample_every=2, zero_stage=3), ranks=2)
    assert [step for step, _ in shown] == [2, 4, 5]
    ema = checkpoint.read(tmp_path / "checkpoints" / "step_00000005", "ema")
    assert all(torch.equal(ema[name], value) for name, value in shown[-1][1].items())


def previewed(run_dir, cfg):
    shown = []

    def preview(model, step, folder):
        assert folder.is_dir() and not model.training
        shown.append((step, {name: w.clone() for name, w in model.state_dict().items()}))

    tiny.trainer(run_dir, cfg, preview).train()
    return shown


def test_the_run_folder_says_what_ran(whole, tmp_path):
    tiny.launch(tiny.train, tmp_path, config(iterations=3))
    assert load_config(tmp_path / "config.yaml") == config(iterations=3)
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert tiny.launch(tiny.train, tmp_path, config(iterations=3))["first_step"] == 3  # finished: trains no more


@pytest.mark.parametrize("batch, micro, ranks", [(10, 4, 1), (9, None, 2), (8, 4, 4), (2, None, 4)])
def test_impossible_batches_name_the_three_numbers(batch, micro, ranks):
    train = tiny.config(batch_size=batch, micro_batch_size=micro).train
    with pytest.raises(UserError, match=rf"batch_size {batch}, micro_batch_size .*, GPUs {ranks}"):
        batch_plan(train, ranks)


@pytest.mark.parametrize("stage, ranks", [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_bf16_resumes_exactly_and_keeps_fp32_weights(stage, ranks, tmp_path):
    """Mixed precision as on a GPU, with accumulated gradients: the masters are saved, not what the model computes with."""
    settings = dict(precision="bf16", zero_stage=stage, micro_batch_size=4, batch_size=16)
    straight = tiny.launch(tiny.train, tmp_path / "straight", config(iterations=8, **settings), ranks=ranks)
    tiny.launch(tiny.train, tmp_path / "halves", config(iterations=4, **settings), ranks=ranks)
    halves = tiny.launch(tiny.train, tmp_path / "halves", config(iterations=8, **settings), ranks=ranks)
    assert halves["losses"] == straight["losses"]
    weight = straight["weights"]["first.weight"]
    assert torch.equal(halves["weights"]["first.weight"], weight)
    assert not torch.equal(weight, weight.bfloat16().float())
