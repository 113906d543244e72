"""On a GPU too: the sampling loop and the training step never make the host wait, as PyTorch itself sees it."""

import subprocess
import sys

import pytest
import torch

from uvit_fast import build_model, build_sampler, load_config
from uvit_fast.diffusion.guidance import Guidance

pytestmark = pytest.mark.gpu

STEPS_THAT_MAY_NOT_WAIT = """
import sys
sys.path[:] = [p for p in sys.path if p]  # as train.py: no plain `kernels`
from pathlib import Path
import torch
from uvit_fast.build import build_dataset, build_model, build_objective
from uvit_fast.config import load_config
from uvit_fast.training.trainer import Trainer

plain = Trainer._step

def step(self, stream):
    batch = next(stream)
    torch.cuda.set_sync_debug_mode("error" if self.step >= 3 else "default")
    plain(self, iter([batch]))
    torch.cuda.set_sync_debug_mode("default")

Trainer._step = step
overrides = ["device=cuda", "model.embed_dim=256", "data.name=synthetic", "train.iterations=6", "train.log_every=100"]
cfg = load_config("configs/digits_eps.yaml", overrides)
Trainer(cfg, build_model(cfg), build_objective(cfg), build_dataset(cfg), Path(sys.argv[1])).train()
"""


def test_the_sampling_loop_waits_for_nothing():
    cfg = load_config("configs/digits_eps.yaml", ["model.embed_dim=256"])
    model = build_model(cfg).to("cuda", torch.bfloat16)
    sampler, x = build_sampler(cfg, 8), torch.randn(4, 1, 8, 8, device="cuda")
    guidance = Guidance(model, {"y": torch.arange(4, device="cuda")}, {"y": 10}, 0.7)
    with torch.no_grad():
        sampler(guidance, x)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler(guidance, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_training_step_waits_for_nothing(pytestconfig, tmp_path):
    command = [sys.executable, "-c", STEPS_THAT_MAY_NOT_WAIT, str(tmp_path)]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
