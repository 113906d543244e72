"""Matrix products with what stands before and after them: a core an architecture, all with the functions of `contract`."""

from importlib import import_module
from types import ModuleType

import torch

from uvit_fast.kernels.runtime.device import architecture


def core(device: torch.device) -> ModuleType:
    """The GEMM core of a device: sm90 on Hopper, sm80 elsewhere."""
    return import_module(f"{__name__}.sm{architecture(device)}")
