"""Signals from a cluster, a user or a closing terminal end a run after the current step, with a checkpoint and exit
code 0.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE = 10  # seconds after a signal for which a step still waits for stalled data


class Stalled(BaseException):
    """Data that did not arrive within GRACE seconds of a signal. A BaseException, since readers of data take an
    Exception for a bad file.
    """


class Interrupt:
    """Whether to stop, with the same answer on every rank.

    Which rank hears the signal first is chance, so the ranks agree by an all-reduce on the host that runs beside the
    next step: with several ranks the answer is one step late, and no rank waits.

    Attributes:
        name: of the signal that this rank got, or None.
        wanted: set by a rank that has a reason of its own to stop.
        void: how many of the last steps this rank had no data for; set by whoever notices.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        """
        Args:
            group: all ranks, on their hosts; None for a single rank.
        """
        self.name: str | None = None
        self.wanted = False
        self.void = 0
        self._heard = 0.0  # time of the signal, by the monotonic clock
        self._group = group
        self._flag, self._work = torch.zeros(1, dtype=torch.int32), None
        in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers there only
        self._before = {number: signal.signal(number, self._note) for number in heeded()} if in_main else {}

    def asked(self) -> bool:
        """Return whether to stop. All ranks must call it once per step."""
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

    def settle(self) -> int:
        """Wait for the last exchange, and return how many of the last steps are void because a rank had no data. All
        ranks must call it, or none.
        """
        if self._group is None:
            return self.void
        if self._work is not None:
            self._work.wait()
            self._work = None
        most = torch.tensor([self.void], dtype=torch.int32)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return int(most)

    def overdue(self) -> bool:
        """Return whether a signal arrived so long ago that waiting should end."""
        return self.name is not None and time.monotonic() - self._heard > GRACE

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._heard = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(OSError):  # `| tee` got the Ctrl-C, too
                os.write(2, b"\nsaving after this step; Ctrl-C again ends at once\n")


def heeded() -> list[signal.Signals]:
    """Return the SIGNALS that the parent process, such as nohup, has not told this one to ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def ticking(tick: Callable[[float], None]) -> Iterator[None]:
    """Call `tick(seconds since the beginning)` once per second, whatever the main thread waits for; an exception from
    it ends the wait. In other threads, which signals do not reach, it is not called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, lambda *_: tick(time.monotonic() - began))
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
