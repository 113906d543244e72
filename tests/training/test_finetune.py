"""What fine-tuning is for: a tenth of the steps."""

import json

import torch

from tests.training import tiny
from uvit_fast.build import build_model, build_objective
from uvit_fast.config import Config
from uvit_fast.data.datasets import split
from uvit_fast.data.in_memory import TensorImages, digits
from uvit_fast.training.trainer import Trainer

SEVEN, THREE, STEPS = range(7), range(7, 10), 150


def of(wanted):
    """The digits of some classes, which are numbered anew."""
    whole, names = digits(), tuple(map(str, wanted))
    chosen = torch.isin(whole.labels, torch.tensor(wanted))
    return TensorImages(whole.images[chosen], whole.labels[chosen] - wanted[0], 16.0, False, names)


def config(classes, steps, every=STEPS // 10, **train):
    model = dict(img_size=8, in_chans=1, patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=classes + 1)
    settings = dict(
        iterations=steps, batch_size=64, lr=4e-3, warmup_steps=4, betas=(0.9, 0.99), weight_decay=0.0, ema_decay=0.8,
        p_uncond=0.1, checkpoint_every=1000,
    )  # fmt: skip
    return Config(
        name="digits",
        device="cpu",
        model=model,
        diffusion=dict(schedule="vp"),
        train={**settings, **train},
        sample=dict(sampler="dpm_fast"),
        data=dict(name="digits", num_workers=0),
        evaluate=dict(every=every, held_out=100),
    )


def train(run_dir, cfg, wanted):
    """The held-out losses, of every `evaluate.every` steps."""
    data, held_out = split(of(wanted), cfg.evaluate.held_out)
    Trainer(cfg, build_model(cfg), build_objective(cfg), data, run_dir, held_out=held_out).train()
    return [json.loads(line)["held_out_loss"] for line in (run_dir / "evaluation.jsonl").read_text().splitlines()]


def test_three_digits_are_learned_after_seven_others_in_a_tenth_of_the_steps(tmp_path):
    """A new label table, the rest from a run of the other classes: a lower loss, of digits that neither run has seen,
    than the same network reaches from scratch in ten times as many steps; in as many it is far from that.
    """
    tiny.launch(train, tmp_path / "seven", config(7, 2 * STEPS, every=STEPS), SEVEN)
    scratch = tiny.launch(train, tmp_path / "scratch", config(3, STEPS), THREE)
    start = {"init": str(tmp_path / "seven"), "init_replace": ["label_emb"]}
    tuned = tiny.launch(train, tmp_path / "tuned", config(3, STEPS // 10, **start), THREE)
    assert len(tuned) == 1 and tuned[-1] < scratch[-1] < 0.5 * scratch[0]
