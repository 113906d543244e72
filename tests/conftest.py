"""Tests marked `interpreter` run in Triton's interpreter, which has to be chosen before Triton is imported: all the
chosen ones in a process of their own, beside the other tests. Each is reported as itself, so that `-k` and node ids
choose among them as among all others.
"""

import functools
import inspect
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: tensors here are too small to share, its threads would spin
ENVIRONMENT = {"TRITON_INTERPRET": "1"}


@pytest.fixture(scope="session")
def digits_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a classifier of the digits in a quarter of the steps, as a cache keeps it: for tests that only need
    to have one.
    """

    from uvit_fast import load_config
    from uvit_fast.measuring import yardstick

    folder, config = tmp_path_factory.mktemp("classifier"), load_config("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvit_fast.evaluation.classifier.STEPS", 150)
        yardstick("digits-fid", config, "digits", (None, False), "cpu", folder)
    return next(folder.glob("classifier-*"))


def _look_once() -> None:
    """Let Triton's interpreter look for the language's builtins, which it replaces at every call of a function, among
    those that it found at first: its search through modules takes as long as the computation.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def names(owner: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

    def members(owner: Any) -> list[tuple[str, Any]]:
        return [(name, getattr(owner, name)) for name in names(owner)]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": members})


def _share_rows() -> None:
    """Give a program of the LayerNorm's kernels several rows of the few that tests have, as it has on a GPU of many:
    the time goes by programs.
    """
    import torch

    from uvit_fast.kernels.runtime import device, tuning

    table = tuning.table(device.architecture(torch.device("cpu")))
    table["ln_backward"] |= {"programs": 40}
    table["prepare"] |= {"rows": 16}


if os.environ.get("TRITON_INTERPRET") == "1":
    _look_once()
    _share_rows()


class Interpreted:
    """The process of the chosen tests, which begins with it."""

    def __init__(self, items: list[pytest.Item], root: Path):
        self._folder = tempfile.TemporaryDirectory()
        self._report, self._output = (Path(self._folder.name, name) for name in ("report.xml", "output"))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-q"]
        with open(self._output, "w") as output:
            self._process = subprocess.Popen(
                [*command, f"--junitxml={self._report}", *(item.nodeid for item in items)],
                cwd=root, env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @functools.cached_property
    def failures(self) -> dict[str, str | None]:
        """Test -> None, or how it failed; waits until all have run."""
        self._process.wait()
        if not self._report.exists():
            return {}
        found: dict[str, str | None] = {}
        for case in ElementTree.parse(self._report).iter("testcase"):
            wrong = [case.find(kind) for kind in ("failure", "error", "skipped")]
            name = f"{case.get('classname')}::{case.get('name')}"
            found[name] = next((w.text or w.get("message") for w in wrong if w is not None), None)
        return found

    def failure(self, item: pytest.Item) -> str | None:
        module = item.nodeid.split("::")[0].removesuffix(".py").replace("/", ".")
        name = f"{module}::{item.name}"
        if name in self.failures:
            return self.failures[name]
        return f"the interpreter's process did not run it: {self._output.read_text(errors='replace')[-6000:]}"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


_interpreted = pytest.StashKey[Interpreted]()


def _is_for_the_interpreter(item: pytest.Item) -> bool:
    return os.environ.get("TRITON_INTERPRET") != "1" and item.get_closest_marker("interpreter") is not None


def pytest_collection_finish(session: pytest.Session) -> None:
    chosen = [item for item in session.items if _is_for_the_interpreter(item)]
    if chosen and not session.config.option.collectonly:
        session.config.stash[_interpreted] = Interpreted(chosen, session.config.rootpath)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not _is_for_the_interpreter(pyfuncitem):
        return None
    failure = pyfuncitem.config.stash[_interpreted].failure(pyfuncitem)
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if _interpreted in config.stash:
        config.stash[_interpreted].end()
