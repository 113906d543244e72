"""Matrix products with their prologues and epilogues: for each architecture a `contract.Core`."""

from importlib import import_module

import torch

from uvit_fast.kernels.gemm.contract import Core
from uvit_fast.kernels.runtime.device import architecture


def core(device: torch.device) -> Core:
    """Return the GEMM core of a device: sm90 on Hopper, sm80 elsewhere."""
    return import_module(f"{__name__}.sm{architecture(device)}").core
