"""What a step adds to the row of scalars under way, on the device."""

import torch
import torch.distributed as dist
from torch import Tensor

from uvit_fast.training.monitor import Mark


class Row:
    """What one row of metrics.jsonl sums up on the device, from `first_step` on."""

    def __init__(self, first_step: int, most: int, device: torch.device, began: Mark | None = None):
        self.first_step, self.began = first_step, began or Mark(device)
        self.losses = torch.zeros(2, most, device=device)  # sum and number of the finite ones, for each step
        self.refused = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)  # of the refused steps in a row
        self.waited = 0.0  # seconds of this rank's host for data

    def add_loss(self, step: int, loss: Tensor) -> None:
        finite = loss.isfinite()
        self.losses[:, step - self.first_step].add_(torch.stack([loss.where(finite, 0.0), finite.float()]))

    def over_ranks(self, end: int) -> Tensor:
        """`losses` of the steps before `end`, (2, steps), added up over the ranks in their order: an all-reduce's order depends on where a
        value stands among the others, and a run that was interrupted has other rows.
        """
        mine = self.losses[:, : end - self.first_step].clone()
        if dist.get_world_size() == 1:
            return mine
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine)
        return sum(everyones[1:], everyones[0])
