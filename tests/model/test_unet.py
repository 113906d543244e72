"""The convolutional baselines: the paper's sizes, and the same trainer and samplers."""

import json
from pathlib import Path

import pytest
import torch

from tests.training import tiny as launcher
from tests.training.test_command import call
from uvit_fast import sampling
from uvit_fast.build import build_model
from uvit_fast.config import ConfigError, load_config

ROOT = Path(__file__).parent.parent.parent
ADM = ["model.unet=adm", "model.img_size=8", "model.in_chans=1", "model.num_classes=11"]
LDM = ["model.unet=ldm", "model.img_size=8", "model.in_chans=4", "model.context_dim=12", "model.context_tokens=5"]
TINY = ["model.channels=[32, 64]", "model.layers=1", "model.attention=[false, true]"]


def tiny(kind: str, tmp_path: Path) -> Path:
    """A config file: digits with ADM's U-Net, or random latents and text with LDM's."""
    text = (ROOT / "configs" / "digits.yaml").read_text()
    head, _, tail = text.partition("model:\n")
    tail = "diffusion: {schedule: vp}\n" + tail[tail.index("train:") :]
    if kind == "ldm":
        tail = tail.replace("name: digits,", "name: synthetic,")
    lines = [item.removeprefix("model.").replace("=", ": ", 1) for item in [*(ADM if kind == "adm" else LDM), *TINY]]
    path = tmp_path / f"{kind}.yaml"
    path.write_text(head + "model:\n" + "".join(f"  {line}\n" for line in lines) + tail)
    return path


@pytest.mark.parametrize("kind", ["adm", "ldm"])
def test_trained_and_sampled_by_the_trainer_and_samplers_of_u_vit(kind, tmp_path):
    run, config = tmp_path / "run", tiny(kind, tmp_path)
    settings = ["train.iterations=3", "train.batch_size=4", "train.log_every=1", "train.warmup_steps=0"]
    settings += ["model.activation_checkpointing=block"]
    sets = [part for setting in settings for part in ("--set", setting)]
    code, lines = launcher.launch(call, ["--config", str(config), "--run-dir", str(run), *sets])
    assert code == 0, lines
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert abs(losses[0] - 1) < 0.35 and losses[2] != losses[0]  # zero output at first: the noise's own variance

    cfg = load_config(run / "config.yaml")
    model = sampling.load_for_sampling(cfg, run, "cpu")
    if kind == "adm":
        assert sum(p.numel() for p in model.parameters()) % 2  # DeepSpeed's buckets are even, this network is not
        condition = {"labels": torch.tensor([1, 7])}
    else:
        condition = {"context": torch.randn(2, 5, 12), "null_context": torch.zeros(5, 12)}
    images = torch.cat(list(sampling.sample(model, cfg, 2, steps=3, **condition)))
    assert images.shape == (2, cfg.model.in_chans, 8, 8) and images.isfinite().all()


def test_the_condition_changes_the_output(tmp_path):
    """With nothing left at zero: labels, text and time all reach the output."""
    for kind in ("adm", "ldm"):
        model = build_model(load_config(tiny(kind, tmp_path)))
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x, t = torch.randn(1, model.net.config.in_channels, 8, 8), torch.tensor([3.5])
        a, b = (
            {"y": torch.tensor([i])} if kind == "adm" else {"context": torch.full((1, 5, 12), i - 1.5)} for i in (1, 2)
        )
        if kind == "ldm":
            b["context"][:, 0] = -1.0
        out = model(x, t, **a)
        assert not torch.allclose(out, model(x, t, **b), rtol=1e-3)
        assert not torch.allclose(out, model(x, t + 400, **a), rtol=1e-3)
        with pytest.raises(
            ValueError, match="y: expected labels" if kind == "adm" else "context: expected text features"
        ):
            model(x, t)
        wrong = {"y": torch.tensor([99])} if kind == "adm" else {"context": torch.zeros(1, 4, 12)}
        words = "y: expected labels from 0 to" if kind == "adm" else r"context: expected shape \(1, 5, 12\)"
        with pytest.raises(ValueError, match=words):
            model(x, t, **wrong)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.chanels=[64]", ["model.chanels", "unknown", "'channels'"]),  # named among the U-Net's keys
        ("model.patch_size=2", ["model.patch_size", "unknown"]),  # a key of the other network
        ("model.attention=[true]", ["attention", "2 levels", "got 1"]),  # two keys that do not fit
    ],
)
def test_a_wrong_key_of_a_u_net_is_named(override, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(tiny("adm", tmp_path), [override])
    assert all(word in str(error.value) for word in words), error.value
