"""Two GPUs of one host give the curve of one, and the host waits for none of their reductions.

python -m tests.gpu.test_two_gpus    # one rank; the first prints its losses and how often it waited, as JSON
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.bench_scaling import Run, torchrun

pytestmark = pytest.mark.gpu

STEPS, FIRST = 12, 3  # the first ones make what is made once
SETTINGS = ["device=cuda", f"train.iterations={STEPS}", "train.warmup_steps=0", "train.lr=3e-4", "model.embed_dim=256"]
SETTINGS += ["train.batch_size=64", "train.micro_batch_size=32"]


def rank() -> None:
    waits = []
    wait = torch.cuda.synchronize
    with tempfile.TemporaryDirectory() as folder:
        run = Run("configs/digits_eps.yaml", SETTINGS, Path(folder))
        for step in range(STEPS):
            if step == FIRST:
                torch.cuda.synchronize = lambda *args: waits.append(args) or wait(*args)
            run.step()
        torch.cuda.synchronize = wait
        losses = run.losses()
    if run.trainer.main:
        print(json.dumps([losses, len(waits)]), flush=True)
    torch.distributed.destroy_process_group()


def train(gpus: int, root: Path) -> list:
    command = torchrun(gpus, "tests.gpu.test_two_gpus")
    done = subprocess.run(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_they_give_the_curve_of_one_and_wait_for_nothing(pytestconfig):
    """One GPU accumulates what two compute at once; bf16 rounds to 3 digits."""
    (alone, _), (together, waits) = (train(gpus, pytestconfig.rootpath) for gpus in (1, 2))
    assert alone[-1] < 0.9 * alone[0]  # it learns
    assert together == pytest.approx(alone, rel=4e-3)
    assert waits == 0


if __name__ == "__main__":
    rank()
