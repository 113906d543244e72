"""The loss on held-out images: it tells learning from memorisation."""

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
BATCH = 64  # on any number of ranks, since random numbers belong to a batch

# error(network, batch of a dataset, noise (B, C, H, W), t (B,) in [0, 1]) -> mean over the batch, 0-d fp32
Error = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], Tensor]


class HeldOut:
    """The mean loss of all items of a dataset at eight times, with their conditions.

    Noise, posteriors and captions are the same each time, so that the figures of two steps, or of two runs, differ by
    their weights alone. The ranks share the batches; the sum does not depend on how many ranks there are.

    Args:
        dataset: the held-out items.
        error: the training's own, which is averaged.
        world: all ranks.
        num_workers: loader processes per rank.
    """

    def __init__(self, dataset: Dataset, error: Error, world: World, num_workers: int):
        self.dataset, self.error, self.world, self.num_workers = dataset, error, world, num_workers
        self.generator = torch.Generator(world.device)

    @torch.no_grad()
    def loss(self, network: nn.Module, overdue: Callable[[], bool]) -> float | None:
        """Measure a network, the same on all ranks; each must call it.

        Args:
            overdue: whether to give up, as after a signal.

        Returns:
            The loss, on all ranks; None if one of them gave up.

        Raises:
            DataError: an item cannot be read.
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
        if world.size > 1:  # each entry is one rank's sum plus zeros
            dist.all_reduce(sums)
        *found, left_off = sums.tolist()
        return None if left_off else sum(found) / (len(items) * len(TIMES))

    def _sum(self, network: nn.Module, number: int, raw: dict[str, Tensor]) -> Tensor:
        """Return the sum over a batch and its times, 0-d fp64."""
        draws = Draws(self.generator.manual_seed(number))
        batch = self.dataset.finish(raw, draws)
        x_0 = batch["x"]  # (B, C, H, W)
        total = torch.zeros((), dtype=torch.float64, device=x_0.device)
        for t in TIMES:
            noise = draws.randn(*x_0.shape)
            total += self.error(network, batch, noise, x_0.new_full((len(x_0),), t)).double() * len(x_0)
        return total
