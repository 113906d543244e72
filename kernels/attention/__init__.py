"""Attention kernels, a core for each architecture, with `forward` and `backward`."""

from importlib import import_module
from types import ModuleType

import torch

from uvit_fast.kernels.runtime.device import architecture


def core(device: torch.device, D: int) -> ModuleType:
    """Return the kernels to run: Hopper's for the head dims that they support, plain Triton everywhere else."""
    return import_module(f"{__name__}.{'sm90_forward' if architecture(device) == 90 and D in (64, 72, 80) else 'sm80'}")
