"""Ranks: how they share a batch, and wait for each other."""

import time
from datetime import timedelta
from functools import partial

import pytest
import torch

from tests.training import tiny
from tests.training.test_trainer import config
from uvit_fast.runtime.errors import UserError
from uvit_fast.training import engine
from uvit_fast.training.engine import batch_plan, start


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


@pytest.mark.parametrize("batch, micro, ranks", [(10, 4, 1), (9, None, 2), (8, 4, 4), (2, None, 4)])
def test_impossible_batches_name_the_three_numbers(batch, micro, ranks):
    train = tiny.config(batch_size=batch, micro_batch_size=micro).train
    with pytest.raises(UserError, match=rf"batch_size {batch}, micro_batch_size .*, GPUs {ranks}"):
        batch_plan(train, ranks)
