"""Flags of a thread's work, for what no argument can pass on."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Flag:
    """False, but true in this thread within `with flag():`, however deeply such contexts are nested."""

    def __init__(self, name: str):
        self._here: ContextVar[bool] = ContextVar(name, default=False)

    def __bool__(self) -> bool:
        return self._here.get()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        token = self._here.set(True)
        try:
            yield
        finally:
            self._here.reset(token)
