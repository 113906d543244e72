"""The training loop: what is computed, and that neither interruption nor sharding changes it."""

import json
import math
import os
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from tests.training import tiny
from uvit_fast.config import load_config
from uvit_fast.diffusion.noise import Draws, seed_from
from uvit_fast.diffusion.objective import Objective
from uvit_fast.training import checkpoint
from uvit_fast.training.loader import Order, batches
from uvit_fast.training.monitor import Reading
from uvit_fast.training.trainer import Trainer

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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_follow_one_process(stage, whole, tmp_path):
    """Losses, weights and averages under each ZeRO stage; every parameter's size is odd,
    so that partitions are padded.
    """
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
    """Two ranks under ZeRO-3, then one under ZeRO-2, then four under ZeRO-3: still the same run, though with other
    micro-batches.
    """
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
        objective=Objective(tiny.Schedule()),
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
    """0 for who predicts it; the noised image and its time are those of u; all drawn in the order that continued runs
    rely on: for the whole batch of 8, of which the second micro-batch has the last four.
    """
    dataset, items = tiny.Points(), [(i, 0) for i in range(8)]
    draws = Draws(torch.Generator().manual_seed(seed_from(0, 5)))
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


def plain_loop(cfg, grad_clip=None, model=None):
    """Losses, gradient norms and weights of a loop in plain PyTorch over the batches of `config`."""
    dataset, model = tiny.Points(), model or tiny.TinyModel()
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
    """Against the plain loop, at a norm that some gradients exceed and others do not: AdamW would not notice a constant
    factor.
    """
    clipped = tiny.launch(tiny.train, tmp_path, config(zero_stage=stage, grad_clip=1.5), ranks=2)
    losses, norms, weights = plain_loop(config(), grad_clip=1.5)
    assert min(norms) < 1.3 and max(norms) > 2
    assert [row["grad_norm"] for row in clipped["rows"]] == pytest.approx(norms, rel=1e-4)
    assert clipped["losses"] == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(clipped["weights"][name], weight, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("stage, ranks", [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_bf16_resumes_exactly_and_keeps_fp32_weights(stage, ranks, tmp_path):
    """Mixed precision as on a GPU, with accumulated gradients: the masters are saved,
    not what the model computes with.
    """
    settings = dict(precision="bf16", zero_stage=stage, micro_batch_size=4, batch_size=16)
    straight = tiny.launch(tiny.train, tmp_path / "straight", config(iterations=8, **settings), ranks=ranks)
    tiny.launch(tiny.train, tmp_path / "halves", config(iterations=4, **settings), ranks=ranks)
    halves = tiny.launch(tiny.train, tmp_path / "halves", config(iterations=8, **settings), ranks=ranks)
    assert halves["losses"] == straight["losses"]
    weight = straight["weights"]["first.weight"]
    assert torch.equal(halves["weights"]["first.weight"], weight)
    assert not torch.equal(weight, weight.bfloat16().float())
