"""The loss on images that are not trained on: the figure that tells learning from learning by heart."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from uvit_fast.data.datasets import Dataset
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.processes import World
from uvit_fast.training.interrupt import Stalled
from uvit_fast.training.loader import batches

TIMES = tuple((i + 0.5) / 8 for i in range(8))  # 0: data, 1: noise
BATCH = 64  # on any number of ranks, since what is drawn belongs to a batch

# error(network, batch of a dataset, noise (B, C, H, W), t (B,) in [0, 1]) -> mean over the batch, 0-d fp32
Error = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], Tensor]


class HeldOut:
    """The mean loss of all items of a dataset at eight times, with their conditions.

    Noise, posteriors and captions are the same each time, so that figures of two steps, or of two runs, differ by their
    weights alone. The ranks share the batches; their sum does not depend on how many there are.

    Args:
        dataset: what is held out.
        error: the training's own, of which this is the mean.
        world: all ranks.
        num_workers: loader processes a rank.
    """

    def __init__(self, dataset: Dataset, error: Error, world: World, num_workers: int):
        self.dataset, self.error, self.world, self.num_workers = dataset, error, world, num_workers
        self.generator = torch.Generator(world.device)

    @torch.no_grad()
    def loss(self, network: nn.Module, overdue: Callable[[], bool]) -> float | None:
        """Measure a network, the same on all ranks, each of which must call it.

        Args:
            overdue: whether to give up, as after a signal.

        Returns:
            The loss, on all ranks; None where one of them gave up.

        Raises:
            DataError: an item that cannot be read.
        """
        world, items = self.world, [(i, 0) for i in range(len(self.dataset))]
        parts = [items[first : first + BATCH] for first in range(0, len(items), BATCH)]
        mine = range(world.rank, len(parts), world.size)
        sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=world.device)  # the last: who gave up
        workers = min(self.num_workers, len(mine))
        stream = batches(self.dataset, [parts[number] for number in mine], workers, world.device, overdue)
        try:
            for number, raw in zip(mine, stream):
                if overdue():
                    raise Stalled
                sums[number] = self._sum(network, number, raw)
        except Stalled:
            sums[-1] = 1
        finally:
            stream.close()
        if world.size > 1:  # of a batch and zeros
            dist.all_reduce(sums)
        *found, left_off = sums.tolist()
        return None if left_off else sum(found) / (len(items) * len(TIMES))

    def _sum(self, network: nn.Module, number: int, raw: dict[str, Tensor]) -> Tensor:
        """Over a batch and its times, 0-d fp64."""
        draws = Draws(self.generator.manual_seed(number))
        batch = self.dataset.finish(raw, draws)
        x_0 = batch["x"]  # (B, C, H, W)
        total = torch.zeros((), dtype=torch.float64, device=x_0.device)
        for t in TIMES:
            noise = draws.randn(*x_0.shape)
            total += self.error(network, batch, noise, x_0.new_full((len(x_0),), t)).double() * len(x_0)
        return total
