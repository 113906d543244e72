"""The device that a process computes on."""

import os

import torch

from uvit_fast.runtime.errors import UserError


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: a GPU where there is one.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: no CUDA device was found; expected a GPU, or device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # the launchers': one GPU a process
    torch.cuda.set_device(device)
    return device
