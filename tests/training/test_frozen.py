"""Frozen weights stay what they are, to the bit and on the average too, and cost no optimizer; the others learn."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training import tiny
from tests.training.test_trainer import plain_loop
from uvit_fast.runtime.errors import UserError
from uvit_fast.training.frozen import freeze

STEPS, LEARN = 20, ("label_emb", "blocks.1.*", "*.bias")
MIDST = ("blocks.1", "last.bias")  # what comes before does not depend on anything that learns


def learning(patterns):
    model = tiny.TinyModel()
    freeze(model, patterns)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def config(**train):
    return tiny.config(**{"iterations": STEPS, "micro_batch_size": 4, "trainable": LEARN, **train})


def in_halves(run_dir, cfg):
    """Train half of the steps and then, with another trainer, the others: what is left behind, and what it takes."""
    half = cfg.model_copy(update={"train": cfg.train.model_copy(update={"iterations": STEPS // 2})})
    tiny.train(run_dir, half)
    run = tiny.trainer(run_dir, cfg)
    first = run.step
    run.train()
    engine = run.engine
    gradients = {name for name, p in engine.deepspeed.parameters if p.grad is not None}
    taken = {name: part.numel() for name, part in {"masters": engine.partition, **engine.moments()}.items()}
    return first, gradients, taken, engine.weights(engine.partition), engine.weights(engine.ema.values)


WAYS = [
    (1, {}),
    (2, {"zero_stage": 1, "micro_batch_size": None}),
    (2, {"zero_stage": 3}),
    (2, {"zero_stage": 3, "trainable": MIDST}),
    (2, {"zero_stage": 2, "offload_optimizer": True}),
    (1, {"precision": "bf16"}),
    (2, {"zero_stage": 3, "precision": "bf16"}),
]


@pytest.mark.parametrize("ranks, settings", WAYS, ids=str)
def test_they_stay_through_training_and_resuming_while_the_others_learn(ranks, settings, tmp_path):
    """As a loop in plain PyTorch has them, whose optimizer gets no other; in bf16 they move, and what is frozen is
    fp32.
    """
    cfg = config(**settings)
    model, learn = tiny.TinyModel(), learning(cfg.train.trainable)
    freeze(model, cfg.train.trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = plain_loop(config(), model=model)[2]

    first, gradients, taken, weights, ema = tiny.launch(in_halves, tmp_path, cfg, ranks=ranks)
    assert first == STEPS // 2 and gradients <= learn
    folder = tmp_path / f"checkpoints/step_000000{STEPS}"
    files = [load_file(folder / f"{name}.safetensors") for name in ("model", "ema")]
    for name, value in expected.items():
        if name not in learn:
            assert all(torch.equal(found[name], before[name]) for found in (weights, ema, *files)), name
            continue
        assert not torch.equal(ema[name], before[name]), name
        if cfg.train.precision != "bf16":
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert load_file(folder / "exp_avg.safetensors").keys() == learn
    least = sum(expected[name].numel() for name in learn)
    padding = ranks * len(learn) if cfg.train.zero_stage == 3 else 2 * ranks
    assert all(least <= numel * ranks <= least + padding for numel in taken.values())


def test_names_patterns_and_modules_choose_what_learns():
    model = tiny.TinyModel()
    for patterns, chosen in (
        (["all"], lambda name: True),
        (["blocks.0"], lambda name: name.startswith("blocks.0.")),
        (["blocks.?.norm"], lambda name: ".norm." in name),
        (["last.weight", "first"], lambda name: name == "last.weight" or name.startswith("first.")),
    ):
        freeze(model, patterns)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n in model.state_dict() if chosen(n)
        }
    with pytest.raises(UserError, match="train.trainable: no parameter is called lable_emb; did you mean label_emb?"):
        freeze(model, ["last", "lable_emb"])


def test_a_run_goes_on_with_what_it_began_to_train(tmp_path):
    """AdamW has no moments of the others."""
    tiny.launch(tiny.train, tmp_path, config(iterations=2))
    said = tiny.launch(refused, tmp_path, config(trainable=["all"]))
    assert "train.trainable ['label_emb', 'blocks.1.*', '*.bias'] there, ['all'] now; expected the same" in said
    assert f"train.init={tmp_path}" in said


def refused(run_dir, cfg):
    with pytest.raises(UserError) as error:
        tiny.trainer(run_dir, cfg)
    return str(error.value)
