"""The imports of a command, done at once."""

import ctypes
import gc
import os
import sys
import threading
from importlib import import_module


def preload(*modules: str, device: str = "cpu") -> None:
    """Import a command's modules without looking for garbage among what they make, which would take a sixth of their
    time; later collections leave all of it out. A process that has torch already is left as it is: it may have garbage.

    Args:
        device: as in a config; unless it is cpu, a thread makes a GPU's context meanwhile.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    if device != "cpu":
        threading.Thread(target=_wake, daemon=True).start()
    gc.disable()
    try:
        for name in modules:
            import_module(name)
        gc.freeze()
    finally:
        gc.enable()


def _wake() -> None:
    """Make the context of this process's GPU, which PyTorch then finds; without a GPU, or a driver, do nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), int(os.environ.get("LOCAL_RANK", "0"))) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
