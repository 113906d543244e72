"""The rows of metrics.jsonl: accumulated on the device, and sent to a host that does not wait for them."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.runtime.processes import World
from uvit_fast.training.monitor import Mark, Reading, utilisation
from uvit_fast.training.spikes import Spikes

SLOW_DATA = 0.5  # share of time waiting for data above which a message names the loader as the bottleneck
Scalars = dict[str, float]


class Row:
    """What one row accumulates on the device, from `first_step` on."""

    def __init__(self, first_step: int, most: int, device: torch.device, began: Mark | None = None):
        self.first_step, self.began = first_step, began or Mark(device)
        self.losses = torch.zeros(2, most, device=device)  # for each step, sum and number of the finite ones
        self.refused = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)  # most refused steps in a row
        self.waited = 0.0  # seconds for which this rank's host waited for data

    def add_loss(self, step: int, loss: Tensor) -> None:
        finite = loss.isfinite()
        self.losses[:, step - self.first_step].add_(torch.stack([loss.where(finite, 0.0), finite.float()]))

    def over_ranks(self, end: int) -> Tensor:
        """Return `losses` of the steps before `end`, (2, steps), summed over the ranks in rank order: in an all-reduce
        the order depends on a value's place among the others, and an interrupted run has other rows.
        """
        mine = self.losses[:, : end - self.first_step].clone()
        if dist.get_world_size() == 1:
            return mine
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine)
        return sum(everyones[1:], everyones[0])


class Rows:
    """The current row, and the previous one on its way to the host.

    Args:
        config: train.log_every and batch_size.
        world: this process; rank 0 writes.
        flops: of one image's forward pass, if known.
        spikes: inspects each step's loss.
        write: called with a row, and remarks about it.
        step: where the run is.

    Attributes:
        most_refused: the most steps in a row without a finite gradient, among the rows read so far.
        in_a_row: number of such steps at the end of the last row read.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        flops: float | None,
        spikes: Spikes,
        write: Callable[[Scalars, list[str]], None],
        step: int,
    ):
        self.train, self.world, self.flops, self.spikes, self.write = config.train, world, flops, spikes, write
        self.row = Row(step, self.train.log_every, world.device)
        self.refused_in_a_row = torch.zeros((), device=world.device)
        self.in_a_row = self.most_refused = 0.0
        self._pending: tuple[Reading, Row, int, float] | None = None  # scalars, their row, its last step and lr

    def add_step(self, refused: Tensor) -> None:
        """Count a step; refused: 0-d fp32, 1 if it changed nothing."""
        row = self.row
        row.refused += refused
        self.refused_in_a_row = (self.refused_in_a_row + refused) * refused
        row.longest = torch.maximum(row.longest, self.refused_in_a_row)

    def end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """End the current row with `step`, if it has any, and send its scalars to the host. All ranks must call it."""
        row = self.row
        if row.first_step >= step:
            return
        self.read(wait=True)
        losses = row.over_ranks(step)  # (2, steps)
        mean = losses.sum(1)
        scalars = [mean[0] / mean[1], grad_norm, row.refused, row.longest, self.refused_in_a_row]
        reading = Reading(torch.cat([torch.stack(scalars), losses[0] / losses[1]]))
        self._pending = (reading, row, step, lr)
        self.row = Row(step, self.train.log_every, self.world.device, reading.time)

    def read(self, wait: bool = False) -> None:
        """Write the pending row once it has reached the host; `wait` for it, or leave it for later."""
        if self._pending is None or not (wait or self._pending[0].ready()):
            return
        (reading, row, step, lr), self._pending = self._pending, None
        loss, grad_norm, refused, longest, self.in_a_row, *losses = reading.read()
        self.most_refused = max(self.most_refused, longest)
        if self.world.rank > 0:
            return
        steps, seconds, remarks = step - row.first_step, reading.time.seconds_since(row.began), []
        speed = steps * self.train.batch_size / seconds
        scalars = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "images_per_second": speed}
        scalars |= utilisation(speed, self.flops, self.world.device, self.world.size)
        scalars["data_wait"] = row.waited / seconds
        if scalars["data_wait"] > SLOW_DATA:
            share = f"{scalars['data_wait']:.0%}"
            remarks.append(f"step {step}: {share} of the time went into waiting for data; see data.num_workers")
        if refused:
            scalars["refused"] = refused
            remarks.append(f"step {step}: {refused:.0f} of {steps} steps skipped, gradient not finite")
        remarks += filter(None, map(self.spikes.look, range(row.first_step + 1, step + 1), losses))
        self.write(scalars, remarks)

    def restart_clock(self) -> None:
        """Leave out the time since the last row, which other work than training took."""
        self.row.began = Mark(self.world.device)
