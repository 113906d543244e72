"""Two launchers that know of each other by address and port only, over the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_command import ROOT, arguments

BIN = Path(sys.executable).parent


def slurm(node: int, port: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """What srun would start as task 0 of a node, and tell it."""
    told = {"SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": port}
    return ["tools/slurm.sh"], {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHON": sys.executable}


def hostfile(node: int, port: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    hosts = folder / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", port]
    return [
        str(BIN / "deepspeed"),
        "--hostfile",
        str(hosts),
        "--no_ssh",
        "--node_rank",
        str(node),
        *meeting,
        "train.py",
    ], {}


@pytest.mark.parametrize("launcher", [slurm, hostfile])
def test_two_launchers_train_one_model(launcher, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    common["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    nodes = []
    for node in range(2):
        command, told = launcher(node, port, tmp_path)
        nodes.append(
            subprocess.Popen(
                [*command, *arguments(tmp_path / "run")], cwd=ROOT, env={**common, **told}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert [output.count("step 4/4") for output in outputs] == [1, 0]  # rank 0 speaks, on its node
