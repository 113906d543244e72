"""How ranks share a batch."""

import pytest

from tests.training import tiny
from uvit_fast.runtime.errors import UserError
from uvit_fast.training.engine import batch_plan


@pytest.mark.parametrize("batch, micro, ranks", [(10, 4, 1), (9, None, 2), (8, 4, 4), (2, None, 4)])
def test_impossible_batches_name_the_three_numbers(batch, micro, ranks):
    train = tiny.config(batch_size=batch, micro_batch_size=micro).train
    with pytest.raises(UserError, match=rf"batch_size {batch}, micro_batch_size .*, GPUs {ranks}"):
        batch_plan(train, ranks)
