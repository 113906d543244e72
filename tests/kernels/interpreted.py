"""The plain-Triton kernels of the linear ops in triton's interpreter: what runs on sm_80, run on the CPU.

The interpreter has to be chosen before triton is imported: each test file runs its kernels in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from uvit_fast.kernels.runtime.device import interpreting

INTERPRETED = interpreting()
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_kernels_in_the_interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")


def run(file: str) -> None:
    """The tests of `file` that are marked for the interpreter, in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts=-q", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def compare(fused, reference, arguments: list[Tensor | None], tolerance: float) -> None:
    """Forward and every gradient of `fused` against `reference` in float64, relative to each result's norm."""
    ours = [None if t is None else t.detach().requires_grad_() for t in arguments]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in arguments]
    y, r = fused(*ours), reference(*exact)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [t for t in ours if t is not None], dy)
    expected = torch.autograd.grad(r, [t for t in exact if t is not None], dy.double())
    for i, (a, b) in enumerate(zip((y, *grads), (r, *expected))):
        assert a.shape == b.shape and a.dtype == y.dtype
        error = (a.double() - b).norm() / b.norm()
        assert error <= tolerance, f"result {i} is off by {error:.1e} of its norm, allowed {tolerance:.1e}"
