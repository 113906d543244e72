"""Scalars of a row, over all ranks."""

import torch

from tests.training import tiny
from uvit_fast.runtime.processes import start
from uvit_fast.training.rows import Row


def rows_of_one_and_of_many():
    """A loss of each of 64 steps over all ranks: in rows of one step, and in one row."""
    world = start("cpu")
    generator = torch.Generator().manual_seed(world.rank)
    losses = torch.rand(64, generator=generator)

    def over_ranks(first, last):
        row = Row(first, last - first, world.device)
        for step in range(first, last):
            row.add_loss(step, losses[step])
        return row.over_ranks(last)

    return torch.cat([over_ranks(step, step + 1) for step in range(64)], 1), over_ranks(0, 64)


def test_a_loss_does_not_depend_on_the_row_it_is_logged_in():
    """Or a continued run's would differ in their last bits; with two ranks there is one order to add in, with four
    there are more.
    """
    single, together = tiny.launch(rows_of_one_and_of_many, ranks=4)
    assert torch.equal(single, together)
