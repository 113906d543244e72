"""A command's imports pass the garbage collector by, which is as before afterwards."""

import gc
import subprocess
import sys
import threading

import pytest
import torch  # noqa: F401
from triton.runtime.cache import triton_key

from uvit_fast.runtime import importing
from uvit_fast.runtime.importing import preload

PROGRAM = """
import gc
from uvit_fast.runtime.importing import preload
collected = []
gc.callbacks.append(lambda phase, info: collected.append(phase))
preload("torch", "uvit_fast.build")
assert not collected and gc.isenabled() and gc.get_freeze_count() > 100_000
"""


def test_imports_are_not_searched_for_garbage():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_missing_leaves_the_collector_as_it_was(monkeypatch):
    frozen = gc.get_freeze_count()
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ModuleNotFoundError):
        preload("uvit_fast.no_such_module")
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_a_process_that_computes_already_keeps_its_collector():
    frozen = gc.get_freeze_count()
    preload("no_such_module")
    assert gc.isenabled() and gc.get_freeze_count() == frozen


class Driver:
    """A driver with some GPUs, which notes what it was asked."""

    def __init__(self, gpus):
        self.gpus, self.asked = gpus, []

    def cuInit(self, flags):
        self.asked.append("init")
        return 0 if self.gpus else 100

    def cuDeviceGet(self, gpu, index):
        self.asked.append(f"GPU {index}")
        return 0 if index < self.gpus else 101

    def cuDevicePrimaryCtxRetain(self, context, gpu):
        self.asked.append("context")
        return 0


@pytest.mark.parametrize("gpus, asked", [(0, ["init"]), (1, ["init", "GPU 1"]), (2, ["init", "GPU 1", "context"])])
def test_the_gpu_of_this_rank_is_prepared(gpus, asked, monkeypatch):
    """What names Triton's kernels is read only after the imports, and only where there is a GPU."""
    driver, imported, named = Driver(gpus), threading.Event(), []
    monkeypatch.setattr(importing.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr("triton.runtime.cache.triton_key", lambda: named.append(imported.is_set()))
    monkeypatch.setenv("LOCAL_RANK", "1")
    thread = threading.Thread(target=importing._prepare, args=(imported,))
    thread.start()
    imported.set()
    thread.join()
    assert driver.asked == asked and named == [True] * (gpus == 2)


def test_a_machine_without_a_driver_has_nothing_to_prepare(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(importing.ctypes, "CDLL", missing)
    importing._prepare(threading.Event())


def test_what_triton_names_its_kernels_by_is_kept():
    """Otherwise to read it ahead would be in vain."""
    assert triton_key() is triton_key()
