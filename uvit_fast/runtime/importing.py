"""The imports of a command, done at once, and without what it does not need."""

import contextlib
import gc
import sys
from collections.abc import Collection, Iterator
from importlib import import_module


def preload(*modules: str) -> None:
    """Import a command's modules without looking for garbage among what they make, which would take a sixth of their
    time; later collections leave all of it out. A process that has torch already is left as it is: it may have garbage.
    """
    if "torch" in sys.modules:
        return
    with uncollected():
        for name in modules:
            import_module(name)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage within, and leave out what was made by then in later collections."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


@contextlib.contextmanager
def absent(packages: Collection[str]) -> Iterator[None]:
    """Let packages seem not to be installed, except those that are imported already: a library that uses them where it
    finds them goes without.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python's mark of a missing module
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:  # as it was left
                del sys.modules[name]
