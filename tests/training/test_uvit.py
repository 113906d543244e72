"""The real network under the real engine: blocks that read their children's weights, recomputed activations,
partitions.
"""

import json

import pytest

from tests.training import tiny
from uvit_fast.build import build_model, build_objective
from uvit_fast.training.trainer import Trainer


def train(run_dir, cfg):
    """U-ViT on 16-pixel images of three classes and a null class; the losses."""
    Trainer(cfg, build_model(cfg), build_objective(cfg), tiny.Points(), run_dir).train()
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def config(checkpointing: str, **settings):
    cfg = tiny.config(iterations=20, micro_batch_size=4, **settings)
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"activation_checkpointing": checkpointing})})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return tiny.launch(train, tmp_path_factory.mktemp("alone"), config("none"))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_two_ranks_follow_one_process(stage, checkpointing, alone, tmp_path):
    losses = tiny.launch(train, tmp_path, config(checkpointing, zero_stage=stage), ranks=2)
    assert losses == pytest.approx(alone, rel=1e-5)
