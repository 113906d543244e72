"""The imports of a command, done at once."""

import gc
import sys
from importlib import import_module


def preload(*modules: str) -> None:
    """Import a command's modules without looking for garbage among what they make, which would take a sixth of their
    time; later collections leave all of it out. A process that has torch already is left as it is: it may have garbage.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        for name in modules:
            import_module(name)
        gc.freeze()
    finally:
        gc.enable()
