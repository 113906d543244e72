"""Tests marked `interpreter` run in Triton's interpreter, which has to be chosen before Triton is imported: in a
process of their own, the chosen tests of a file in one. Each is reported as itself, so that `-k` and node ids choose
among them as among all others.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: tensors here are too small to share, its threads would spin
ENVIRONMENT = {"TRITON_INTERPRET": "1"}
_reports: dict[Path, dict[str, str | None]] = {}  # file -> test -> None, or how it failed


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


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if os.environ.get("TRITON_INTERPRET") == "1" or pyfuncitem.get_closest_marker("interpreter") is None:
        return None
    if pyfuncitem.path not in _reports:
        chosen = [item for item in pyfuncitem.session.items if item.path == pyfuncitem.path]
        chosen = [item for item in chosen if item.get_closest_marker("interpreter")]
        _reports[pyfuncitem.path] = _interpret(pyfuncitem.path, chosen, pyfuncitem.config.rootpath)
    failure = _reports[pyfuncitem.path].get(pyfuncitem.name, "the interpreter's process did not run it")
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    return True


def _interpret(file: Path, items: list[pytest.Item], root: Path) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-q", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, *(item.nodeid for item in items)], cwd=root, env=os.environ | ENVIRONMENT,
            capture_output=True, text=True,
        )  # fmt: skip
        if not os.path.exists(report):
            return {
                item.name: f"{file.name} in the interpreter: {done.stdout[-4000:]}{done.stderr[-2000:]}"
                for item in items
            }
        found: dict[str, str | None] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = [case.find(kind) for kind in ("failure", "error", "skipped")]
            found[case.get("name")] = next((w.text or w.get("message") for w in wrong if w is not None), None)
        return found
