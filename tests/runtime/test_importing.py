"""A command's imports pass the garbage collector by, which is as before afterwards."""

import gc
import subprocess
import sys

import pytest
import torch  # noqa: F401

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
