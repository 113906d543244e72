"""The processes of a job wait for each other, and end with their launcher."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from unittest import mock

import psutil
import pytest
import torch

from tests.training import tiny
from uvit_fast.runtime import processes
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import start


def waits_for_the_first():
    """Two seconds and a half, where a collective gives up after one; then its result, and its mistake."""
    torch.distributed.init_process_group = partial(torch.distributed.init_process_group, timeout=timedelta(seconds=1))
    world = start("cpu")

    def mistaken():
        raise UserError("expected more")

    answer = world.on_first(lambda: time.sleep(2.5) or "rank 0's")
    with pytest.raises(UserError, match="expected more"):
        world.on_first(mistaken)
    return answer


def test_ranks_wait_for_what_the_first_does_alone():
    assert tiny.launch(waits_for_the_first, ranks=2) == "rank 0's"


RANK = (
    "import signal, time; from uvit_fast.runtime.processes import follow_launcher; "
    "follow_launcher(); print('up', flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("killed", [0, 1], ids=["outer", "inner"])
def test_a_rank_ends_with_its_launcher(killed, tmp_path):
    """With deepspeed's first process, which nobody watches, and with its second, which started the rank: a file of each
    name.
    """
    (tmp_path / "rank.py").write_text(RANK)
    inner = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'rank.py')!r}])"
    for name, code in (
        ("deepspeed.launcher.launch", inner),
        (
            "deepspeed",
            "import subprocess, sys; "
            f"subprocess.run([sys.executable, {str(tmp_path / 'deepspeed.launcher.launch')!r}])",
        ),
    ):
        (tmp_path / name).write_text(code)
    environment = {**os.environ, "WORLD_SIZE": "1", "PYTHONPATH": os.getcwd()}
    outer = subprocess.Popen(
        [sys.executable, str(tmp_path / "deepspeed")], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert outer.stdout.readline() == "up\n"
    chain = [psutil.Process(outer.pid), *psutil.Process(outer.pid).children(recursive=True)]
    chain[killed].kill()
    assert f"the launcher (pid {outer.pid}) is gone" in outer.stdout.readline()
    _, alive = psutil.wait_procs(chain[1:], timeout=10)
    assert chain[2] not in alive
    outer.wait()


def test_a_shell_may_go_before_what_it_started(monkeypatch):
    """Nor is a process without a launcher one's rank, though a variable says so."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    parents = mock.Mock(return_value=[mock.Mock(**{"cmdline.return_value": ["bash", "-c", "deepspeed"]})])
    with mock.patch.object(psutil.Process, "parents", parents):
        assert processes._launchers() == []
