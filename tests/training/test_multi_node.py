"""Two launchers that know of each other by address and port only, over the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.training import tiny
from tests.training.test_command import ROOT, arguments

BIN = Path(sys.executable).parent


def slurm(rank: int, port: str) -> tuple[list[str], dict[str, str]]:
    """What srun would start as a node's only task, and tell it."""
    told = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": port}
    return ["tools/slurm.sh"], {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHON": sys.executable}


def hostfile(rank: int, port: str, hosts: Path) -> tuple[list[str], dict[str, str]]:
    """DeepSpeed's launcher, which starts this node's rank of the file's two."""
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", port]
    launcher = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank)]
    return [*launcher, *meeting, "train.py"], {}


def test_two_launchers_train_one_model(tmp_path):
    """One of each kind, which is one run to the ranks: what a launcher says is all that they know."""
    port = str(tiny.free_port())
    common = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    common["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    nodes = []
    for command, told in (slurm(0, port), hostfile(1, port, tmp_path / "hosts")):
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
