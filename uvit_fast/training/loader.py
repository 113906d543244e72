"""Batches in an order that a seed and a position determine, so that a run can continue in the middle of an epoch.

The data is one endless stream of samples: epoch after epoch, each a permutation drawn from (seed, epoch). Position p is
item p mod N of epoch p // N. Step s takes the next `batch_size` positions; a batch may straddle two epochs, so that no
sample is dropped and each epoch shows each sample once. Within a step, micro-batch m = k * ranks + rank (k counts a
rank's forward passes) takes the m-th run of `micro_batch` positions: with the same micro-batch size, another number of
ranks sees the same micro-batches.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from types import FrameType, TracebackType
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from uvit_fast.data.datasets import Dataset
from uvit_fast.runtime.errors import RankError, UserError
from uvit_fast.training.interrupt import Stalled, heeded, ticking
from uvit_fast.training.monitor import say

STALLED = 30  # seconds without a batch after which a message names the loader


class DataError(RankError):
    """Data that cannot be read."""


class Order:
    """The (index, epoch) pairs of this rank's micro-batches.

    Args:
        length: N, samples in the dataset. seed: of the permutations.
        micro_batch, accumulation: samples per forward pass and passes per step, on each of `ranks` ranks.
        position: samples that the run has taken so far, over all ranks. steps: how many steps to provide.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        ranks: int,
        position: int,
        steps: int,
    ):
        self.length, self.seed, self.micro_batch, self.accumulation = length, seed, micro_batch, accumulation
        self.rank, self.ranks, self.position, self.steps = rank, ranks, position, steps
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            for k in range(self.accumulation):
                passes = (step * self.accumulation + k) * self.ranks + self.rank
                yield self.pairs(self.position + passes * self.micro_batch)

    def pairs(self, start: int) -> list[tuple[int, int]]:
        """Return the `micro_batch` pairs from position `start`."""
        found: list[tuple[int, int]] = []
        while len(found) < self.micro_batch:
            epoch, offset = divmod(start + len(found), self.length)
            indices = self._of(epoch)[offset : offset + self.micro_batch - len(found)].tolist()
            found += [(i, epoch) for i in indices]
        return found

    def _of(self, epoch: int) -> Tensor:
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = (epoch, torch.randperm(self.length, generator=generator))
        return self._permutation[1]


def batches(
    dataset: Dataset,
    order: Order | list[list[tuple[int, int]]],
    num_workers: int,
    device: torch.device,
    overdue: Callable[[], bool] = bool,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield the raw batches of `order` on `device`; copies to a GPU overlap with its work. Closing the iterator ends
    its loader processes.

    Args:
        overdue: whether to give up waiting for a batch, as after a signal; called once per second.

    Raises:
        DataError: in place of the dataset's UserError, also in a loader process, and if a loader process died.
        Stalled: a batch was given up.
    """
    loader: Any = iter(
        DataLoader(
            cast(torch.utils.data.Dataset, dataset),  # it calls `__getitems__` alone
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_prepare_worker,
        )
    )
    processes = loader._workers if num_workers else []
    if (
        processes
    ):  # else torch's SIGCHLD handler raises in the middle of a step; waiting for a batch finds a dead process too
        signal_handling._remove_worker_pids(id(loader))
        loader._worker_pids_set = False
    try:
        for _ in range(len(order)):
            raw = _next(loader, [process.pid for process in processes], overdue)
            yield {name: value.to(device, non_blocking=True) for name, value in raw.items()}
    except Stalled:  # in the middle of a batch, neither the processes nor the thread that reads from them would end
        if processes:
            loader._shutdown = True
        for process in processes:
            process.kill()
        raise
    finally:  # not left to the garbage collector: at exit they would get SIGTERM, which they survive
        if processes:
            loader._shutdown_workers()


def _next(loader: Iterator[dict[str, Tensor]], processes: list[int], overdue: Callable[[], bool]) -> dict[str, Tensor]:
    said = 0

    def tick(seconds: float) -> None:
        nonlocal said
        if overdue():
            raise Stalled
        if seconds >= said + STALLED:
            said = round(seconds)
            say(
                f"no batch for {said} s: this waits for the data and its loader processes, not for a GPU"
                + "".join(
                    f"; loader process {pid} is stopped: kill -CONT {pid}" for pid in processes if _is_stopped(pid)
                )
            )

    try:
        with ticking(tick):
            return next(loader)
    except UserError as error:  # a loader process sends its traceback as the message
        problem = str(error).strip().split("\n")[-1].split("UserError: ")[-1]
    except RuntimeError as error:
        problem = str(error).split("\n")[0]
        if "DataLoader worker" not in problem:
            raise
        problem += "; was there too little memory for data.num_workers?"
    raise DataError(problem)


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _as_it_is(raw: Any) -> Any:
    return raw


def _prepare_worker(worker: int) -> None:
    """Let a loader process survive a signal to the whole job, so that the trainer can finish its step and save, and end
    silently after it.

    A cluster, or Ctrl-C, signals every process of a job.
    """
    for number in heeded():
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else _not_yet)
    sys.excepthook = _print_unless_alone


def _print_unless_alone(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception of the thread that passes tensors to the trainer, unless the trainer was killed meanwhile."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _not_yet(number: int, frame: FrameType | None) -> None:
    """Ignore the first signal. The second, which may be the trainer's own, or the alarm after the longest of steps,
    ends the process.
    """
    signal.signal(number, signal.SIG_DFL)
    signal.alarm(600)
