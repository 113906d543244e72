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
        device: as in a config; unless it is cpu, a thread prepares a GPU meanwhile, see `_prepare`.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    imported = threading.Event()
    gc.disable()
    try:
        if device != "cpu":
            threading.Thread(target=_prepare, args=(imported,)).start()  # an exit waits for it: none within the driver
        for name in modules:
            import_module(name)
        gc.freeze()
    finally:
        gc.enable()
        imported.set()


def _prepare(imported: threading.Event) -> None:
    """Do what takes long and leaves Python to others: make the context of this process's GPU, which PyTorch then finds;
    after the imports, let Triton hash its own library, of 500 MB, as it does before it looks its first kernel up.
    Without a driver, or a GPU, do nothing.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    gpu, context, rank = ctypes.c_int(), ctypes.c_void_p(), os.environ.get("LOCAL_RANK", "0")
    if not rank.isdecimal() or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(gpu), int(rank)):
        return
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
    imported.wait()
    if "triton" in sys.modules:  # not if the imports failed
        from triton.runtime.cache import triton_key

        triton_key()
