"""SIGTERM and SIGUSR1, by which a cluster takes the machine back, and Ctrl-C end the run at a step's end, with a checkpoint and exit code 0."""

import os
import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """Whether to stop, the same answer on every rank.

    Which rank hears the signal first is chance, so ranks agree by an all-reduce on the host that runs beside the next step: with several ranks
    the answer is one step late, and no rank waits.

    Attributes:
        name: of the signal that this rank got, or None.
        wanted: set where a rank has a reason of its own.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        """
        Args:
            group: all ranks, on their hosts; None alone.
        """
        self.name: str | None = None
        self.wanted = False
        self._group = group
        self._flag, self._work = torch.zeros(1, dtype=torch.int32), None
        in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers there only
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS} if in_main else {}

    def asked(self) -> bool:
        """All ranks must call it once a step."""
        mine = self.wanted or self.name is not None
        if self._group is None:
            return mine
        answer = False
        if self._work is not None:
            self._work.wait()
            answer = bool(self._flag)
        self._flag = torch.tensor([mine], dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def settle(self) -> None:
        """Wait for the last exchange, of which nobody wants the answer. All ranks must call it, or none."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nsaving after this step; Ctrl-C again ends at once\n")
