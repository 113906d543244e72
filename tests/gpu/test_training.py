"""One GPU, the whole step with the fused ops: ZeRO stages, what blocks keep, offload and torch.compile give one curve
of losses.

python -m tests.gpu.test_training <device> <name> [<name> ...]    # the named ways of `WAYS`, as JSON
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

STEPS = 8
WAYS = {  # how it is computed, never what
    "plain": [],
    "uncaptured": ["train.cuda_graphs=false"],
    "zero1": ["train.zero_stage=1"],
    "zero3": ["train.zero_stage=3"],
    "block": ["model.activation_checkpointing=block"],
    "selective": ["model.activation_checkpointing=selective"],
    "zero3 selective": ["train.zero_stage=3", "model.activation_checkpointing=selective"],
    "zero3 block": ["train.zero_stage=3", "model.activation_checkpointing=block"],
    "offload": ["train.offload_optimizer=true"],
    "zero3 offload": ["train.zero_stage=3", "train.offload_optimizer=true"],
    "compile": ["train.compile=true"],
    "reference": ["model.kernels=reference", "model.attention=sdpa"],
}
FROZEN = "train.trainable=[label_emb,out_blocks,norm]"
WAYS |= {f"frozen {way}": [FROZEN, *WAYS[way]] for way in ("plain", "uncaptured", "zero3", "block", "offload")}


def losses(way: str, device: str) -> list[float]:
    """Of a network of five blocks with skips, 96 wide on a CPU, 256 on a GPU, whose learning rate is there from the
    first step.
    """
    from benchmarks.bench_scaling import Run

    settings = [f"device={device}", f"train.iterations={STEPS}", "train.warmup_steps=0", "train.lr=3e-4"]
    settings += ["model.embed_dim=256"] if device == "cuda" else []
    with tempfile.TemporaryDirectory() as folder:
        run = Run("configs/digits_eps.yaml", [*settings, *WAYS[way]], Path(folder))
        for _ in range(STEPS):
            run.step()
        return run.losses()


def test_every_way_gives_the_plain_curve(pytestconfig, cores):
    """bf16 rounds to 3 digits, and the curve falls by far more than the ways may differ."""
    found = {}  # compiled in a process of its own, as a run is
    for ways in ([way for way in WAYS if way != "compile"], ["compile"]):
        command = [sys.executable, "-m", "tests.gpu.test_training", "cuda", *ways]
        done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found |= json.loads(done.stdout.splitlines()[-1])
    for way, curve in found.items():
        assert curve == pytest.approx(found["frozen plain" if way.startswith("frozen") else "plain"], rel=4e-3), way
    assert found["uncaptured"] == found["plain"]  # to the bit
    assert found["frozen uncaptured"] == found["frozen plain"] != found["plain"]


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if p]
    print(json.dumps({way: losses(way, sys.argv[1]) for way in sys.argv[2:]}))
