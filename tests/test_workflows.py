"""The workflows name commands that there are."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_target_and_folder_of_a_workflow_exists(path):
    makefile = (ROOT / "Makefile").read_text()
    found = commands(path)
    assert found
    for command in found:
        for target in re.findall(r"^make (\S+)", command):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{path.name}: make {target}"
        for folder in re.findall(r"pytest (\w+)", command):
            assert (ROOT / folder).is_dir(), f"{path.name}: {command}"


def test_ci_runs_what_must_pass_before_a_change_lands():
    """Lint, the tests and the guards: .ci/run's commands, and the guards inside `make test`."""
    wanted = re.findall(r"^make \w+", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    ran = " ; ".join(commands(ROOT / ".github" / "workflows" / "ci.yml"))
    assert wanted and all(command in ran for command in wanted)
    target = (ROOT / "Makefile").read_text().split("\ntest:")[1].split("\n\n")[0]
    assert "pytest benchmarks --benchmark-only" in target
