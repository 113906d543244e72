"""Messages while kernels are compiled, for which the first call of a kind waits."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed

from triton import knobs

AFTER = 1.0  # seconds of one kernel, after which a line says what goes on
EVERY = 10.0  # seconds between lines that say how far it is


class _Told:
    def __init__(self):
        self.lock = threading.Lock()
        self.kernels = 0  # compiled since the first line
        self.began = self.last = 0.0  # when the first line was, and the last

    def begin(self) -> None:
        with self.lock:
            if not self.began:
                self.began = self.last = time.monotonic()
                _say(f"compiling GPU kernels for up to a minute, once: they are kept in {knobs.cache.dir}")

    def end(self) -> None:
        with self.lock:
            self.kernels += 1
            now = time.monotonic()
            if now - self.last > EVERY:
                self.last = now
                _say(f"compiling GPU kernels: {self.kernels} are done after {now - self.began:.0f} s")


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"uvit-fast: {text}", file=sys.stderr, flush=True)


_told = _Told()


@contextlib.contextmanager
def told() -> Iterator[Callable[[], None]]:
    """Around what compiles kernels, or finds those of earlier processes, which takes no line; call the result as each
    is done.
    """
    slow = threading.Event()

    def begin() -> None:
        _told.begin()
        slow.set()

    timer = threading.Timer(AFTER, begin)
    timer.daemon = True
    timer.start()
    try:
        yield lambda: _told.end() if slow.is_set() else None
    finally:
        timer.cancel()


def all_told(compiling: Iterable[Future]) -> None:
    """Wait for kernels that are compiled at once, as `told`."""
    with told() as done:
        for _ in as_completed(compiling):
            done()
