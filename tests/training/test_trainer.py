"""The training loop: what is computed, and that neither interruption nor sharding changes it."""

import pytest
import torch

from tests.training import tiny

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
    """Losses, weights and averages under each ZeRO stage; every parameter's size is odd, so that partitions are padded."""
    sharded = tiny.launch(tiny.train, tmp_path, config(zero_stage=stage), ranks=2)
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sharded["ema"][name], whole["ema"][name], rtol=1e-4, atol=1e-5)


def test_resume_on_other_ranks_and_stage(whole, tmp_path):
    """Two ranks under ZeRO-3, then one under ZeRO-2, then two under ZeRO-3 again: still the same run."""
    third = STEPS // 3
    tiny.launch(tiny.train, tmp_path, config(iterations=third, zero_stage=3), ranks=2)
    tiny.launch(tiny.train, tmp_path, config(iterations=2 * third, zero_stage=2))
    continued = tiny.launch(tiny.train, tmp_path, config(zero_stage=3), ranks=2)
    assert continued["first_step"] == 2 * third
    assert continued["losses"] == pytest.approx(whole["losses"], rel=1e-4)
