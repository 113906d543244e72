"""Frozen weights stay what they are, to the bit and on the average too, and cost no optimizer; the others learn."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training import tiny
from tests.training.test_trainer import plain_loop
from uvit_fast.runtime.errors import UserError
from uvit_fast.training.frozen import freeze

STEPS, LEARN = 20, ("label_emb", "blocks.1.*", "*.bias")


def learns(name):
    return name.startswith(("label_emb.", "blocks.1.")) or name.endswith(".bias")


def config(**train):
    return tiny.config(**{"iterations": STEPS, "micro_batch_size": 4, "trainable": LEARN, **train})


def in_halves(run_dir, cfg):
    """Train half of the steps and then, with another trainer, the others: what is left behind, and what it takes."""
    half = cfg.model_copy(update={"train": cfg.train.model_copy(update={"iterations": STEPS // 2})})
    tiny.train(run_dir, half)
    run = tiny.trainer(run_dir, cfg)
    first, gradients = run.step, []
    run.train()
    engine = run.engine
    gradients = [name for name, p in engine.deepspeed.parameters if p.grad is not None and not learns(name)]
    taken = {name: part.numel() for name, part in {"masters": engine.partition, **engine.moments()}.items()}
    return first, gradients, taken, engine.weights(engine.partition), engine.weights(engine.ema.values)


@pytest.fixture(scope="module")
def plainly():
    """Of a loop in plain PyTorch, whose optimizer has those that learn."""
    model = tiny.TinyModel()
    freeze(model, LEARN)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    return before, plain_loop(config(), model=model)[2]


WAYS = [
    (1, {}),
    (2, {"zero_stage": 1, "micro_batch_size": None}),
    (2, {"zero_stage": 3}),
    (2, {"zero_stage": 2, "offload_optimizer": True}),
    (1, {"precision": "bf16"}),
    (2, {"zero_stage": 3, "precision": "bf16"}),
]


@pytest.mark.parametrize("ranks, settings", WAYS, ids=str)
def test_they_stay_through_training_and_resuming_while_the_others_learn(ranks, settings, plainly, tmp_path):
    first, gradients, taken, weights, ema = tiny.launch(in_halves, tmp_path, config(**settings), ranks=ranks)
    before, expected = plainly
    bf16 = settings.get("precision") == "bf16"
    assert first == STEPS // 2 and gradients == []
    files = {
        name: load_file(tmp_path / f"checkpoints/step_000000{STEPS}/{name}.safetensors") for name in ("model", "ema")
    }
    for name, value in expected.items():
        if learns(name):
            torch.testing.assert_close(
                weights[name], value, rtol=1e-4 if not bf16 else 0.2, atol=1e-5 if not bf16 else 0.05
            )
            assert not torch.equal(ema[name], before[name])
        else:
            for found in (weights, ema, files["model"], files["ema"]):
                assert torch.equal(found[name], before[name]), name
    learning = sum(value.numel() for name, value in expected.items() if learns(name))
    padding = 2 * ranks if settings.get("zero_stage") != 3 else ranks * len(expected)
    for name, numel in taken.items():
        assert learning <= numel * ranks <= learning + padding, name
    moments = load_file(tmp_path / f"checkpoints/step_000000{STEPS}/exp_avg.safetensors")
    assert moments.keys() == {name for name in expected if learns(name)}


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
