"""The memory benchmark's ways of training differ by what they are named for."""

import gc
import weakref

import pytest
import torch

from benchmarks.bench_memory import Paper, saved_bytes
from benchmarks.bench_training import Ours, config

SMALL = ["model.embed_dim=64", "model.num_heads=2", "model.depth=4", "train.p_uncond=0.1"]
BLOCKS, BATCH, HEADS, L = 5, 2, 2, 258


@pytest.fixture(scope="module")
def saved():
    found = {}
    for provider in ("paper", "paper-efficient"):
        subject = Paper("L", provider, BATCH, "cpu", SMALL)
        for policy in ("none", "block"):
            subject.keep(policy)
            found[provider, policy] = saved_bytes(subject.loss, subject.net.parameters())
    return found


def test_plain_attention_keeps_a_matrix_of_tokens_by_tokens_a_head(saved):
    """fp32 on a CPU: the softmax, at least, of every block."""
    more = saved["paper", "none"] - saved["paper-efficient", "none"]
    assert more > 0.9 * BLOCKS * BATCH * HEADS * L**2 * 4


def test_checkpointing_keeps_little_more_than_the_blocks_inputs(saved):
    inputs = (2 * BLOCKS // 2 + BLOCKS // 2 + 1) * BATCH * L * 64 * 4  # and the skips, which are some blocks' inputs
    assert saved["paper-efficient", "block"] < 2 * inputs < saved["paper-efficient", "none"] / 4


def test_a_step_updates_the_weights_and_their_average():
    torch.manual_seed(0)
    subject = Paper("L", "paper", 1, "cpu", SMALL)
    before = [subject.weights[0].detach().clone(), subject.ema[0].clone()]
    subject.step()
    assert not torch.equal(subject.weights[0], before[0]) and not torch.equal(subject.ema[0], before[1])


def test_what_was_measured_is_not_kept():
    """A softmax saves its output, a closed engine's hooks its network: either would stay in the next one's figures."""
    outputs = []

    def forward():
        outputs.append(weakref.ref(torch.softmax(torch.randn(4, 4, requires_grad=True), 1)))

    assert saved_bytes(forward, []) == 64 and outputs[0]() is None
    cfg = config("L", "ours", 2, "cpu", [*SMALL, "model.img_size=8", "train.warmup_steps=0"])
    subject = Ours(cfg, torch.device("cpu"))
    subject.step()
    network = weakref.ref(subject.net)
    subject.close()
    del subject
    gc.collect()
    assert network() is None
