"""A command's imports pass the garbage collector by, which is as before afterwards; packages can seem absent."""

import gc
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import torch  # noqa: F401

from uvit_fast.runtime.importing import absent, preload

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


def test_a_package_that_seems_absent_is_there_again_afterwards(tmp_path, monkeypatch):
    (tmp_path / "some_library.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError), absent(["some_library", "torch", "no_such_module"]):
        assert importlib.util.find_spec("some_library") is None and importlib.util.find_spec("torch")
        with pytest.raises(ModuleNotFoundError):
            import some_library
        raise RuntimeError
    import some_library

    assert some_library and "no_such_module" not in sys.modules


def test_marks_that_a_library_replaces_or_removes_meanwhile_are_its_own_affair(monkeypatch):
    stub, names = ModuleType("some_stub"), ["some_stub", "no_such_module", "nor_this"]
    monkeypatch.setitem(sys.modules, "some_stub", stub)
    del sys.modules["some_stub"]
    with absent(names):
        sys.modules["some_stub"] = stub
        del sys.modules["no_such_module"]
    assert sys.modules["some_stub"] is stub and not {"no_such_module", "nor_this"} & sys.modules.keys()
