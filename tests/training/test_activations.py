"""What blocks keep within a budget: predicted from single blocks, held against the whole network."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.counting import Counts, hopper
from tests.training import tiny
from uvit_fast.build import build_model
from uvit_fast.config import load_config
from uvit_fast.diffusion.objective import Objective
from uvit_fast.runtime.errors import UserError
from uvit_fast.training import activations
from uvit_fast.training.activations import LiveBytes, Network, example, plan_within
from uvit_fast.training.trainer import Trainer

GB = 10**9


class OnAnH100:
    """Bytes alive on the meta device where the fused ops run down to their launches."""

    def __enter__(self) -> LiveBytes:
        self.stack = contextlib.ExitStack()
        live = self.stack.enter_context(LiveBytes())
        counts = self.stack.enter_context(Counts())
        self.stack.enter_context(hopper(counts))
        return live

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def network(name: str, batch: int, device: str, dtype: torch.dtype):
    cfg = load_config(f"configs/{name}.yaml")
    with torch.device(device):
        model = build_model(cfg)
    return cfg, model.to(dtype), activations.inspect(model, cfg.model, batch, torch.device(device), dtype)


def used(model, cfg, batch: int, plan: list[str], meter) -> int:
    """The most bytes that a forward and backward of the whole network hold with a plan."""
    for block, policy in zip(model.blocks, plan):
        block.checkpointing = policy
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(activations._discard)
    inputs, conditions = example(cfg.model, batch, model.pos_embed.device)
    with meter as memory:
        model(*inputs, **conditions).float().square().mean().backward()
        return memory.most()


def within(peak: int, found: Network, budget: float) -> None:
    """At most 5% above the budget, and no more than a step of the ladder below it."""
    step = max(cost["none"].kept for cost in found.costs)
    assert 0.95 * budget - step <= peak <= 1.05 * budget


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_plain_pytorch_stays_within_its_budget(share):
    cfg, model, found = network("digits", 16, "cpu", torch.float32)
    least, most = (found.peak([policy] * 5) for policy in ("block", "none"))
    budget = least + share * (most - least)
    within(used(model, cfg, 16, plan_within(budget, found), LiveBytes()), found, budget)


@pytest.mark.parametrize(("name", "budget"), [("h2_256", 12 * GB), ("h2_256", 20 * GB), ("s2_coco", 3 * GB)])
def test_the_fused_ops_stay_within_their_budget(name, budget, monkeypatch):
    """At batch 128 in bf16, temporaries of the ops included; skips of labels and of text."""
    monkeypatch.setattr(activations, "LiveBytes", OnAnH100)
    cfg, model, found = network(name, 128, "meta", torch.bfloat16)
    within(used(model, cfg, 128, plan_within(budget, found), OnAnH100()), found, budget)


@pytest.mark.parametrize("size", models.CONFIGS)
def test_the_documented_peaks_are_those_of_whole_networks(size):
    """A row of the table in docs/training.md: GB with none, selective and block at batch 128, temporaries included."""
    (row,) = re.findall(rf"\| {size}/2 \| [\d.]+ \| (.*) \|", Path("docs/training.md").read_text())
    cfg = load_config(f"configs/{models.CONFIGS[size]}.yaml", models.LATENT)
    for policy, documented in zip(("none", "selective", "block"), row.split(" | "), strict=True):
        with torch.device("meta"):
            model = build_model(cfg).to(torch.bfloat16)
        peak = used(model, cfg, 128, [policy] * len(model.blocks), OnAnH100())
        assert f"{peak / GB:.2f}" == documented, policy


def test_what_is_kept_is_what_autograd_saves():
    """A block that keeps everything, by the count of PyTorch's own hooks; its output is kept for the next."""
    _, model, found = network("digits", 16, "cpu", torch.float32)
    block, kept = model.in_blocks[0], {}
    x = torch.zeros(16, model.pos_embed.shape[1], 96, requires_grad=True)
    there = {t.untyped_storage()._cdata for t in (x, *block.parameters())}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(x)
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in there)
    assert found.costs[0]["none"].kept == saved + output.nbytes
    assert found.costs[0]["block"].kept == output.nbytes


def test_a_larger_budget_recomputes_no_more():
    _, _, found = network("digits", 4, "cpu", torch.float32)
    least, most = (found.peak([policy] * 5) for policy in ("block", "none"))
    plans = [plan_within(least + i / 9 * (most - least), found) for i in range(10)]
    heights = [sum(activations.LADDER.index(policy) for policy in plan) for plan in plans]
    assert heights == sorted(heights) and heights[0] < heights[5] < heights[-1] == 10
    with pytest.raises(UserError, match="expected at least"):
        plan_within(0.9 * least, found)


def planned(run_dir, cfg) -> tuple[list[str], str]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        trainer = Trainer(cfg, build_model(cfg), Objective(tiny.Schedule()), tiny.Points(), run_dir)
    return [block.checkpointing for block in trainer.engine.deepspeed.module.blocks], said.getvalue()


def test_the_trainer_chooses_and_says_what(tmp_path):
    cfg = tiny.config()
    selective = {"model": cfg.model.model_copy(update={"activation_checkpointing": "selective"})}
    selective["train"] = cfg.train.model_copy(update={"activation_memory_gb": 110e-6})
    plan, said = tiny.launch(planned, tmp_path, cfg.model_copy(update=selective))
    assert len(set(plan)) > 1, said
    assert said.startswith("activations: of 3 blocks ")
