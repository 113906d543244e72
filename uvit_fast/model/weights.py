"""Weights in and out: the published `.pth` checkpoints and our own safetensors hold the same names."""

import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from uvit_fast.config import UserError
from uvit_fast.model.uvit import UViT


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a `.pth` (loaded with weights_only) or `.safetensors` file, on the CPU.

    Raises:
        UserError: no such file, or one that holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; expected a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise their own kinds for truncated and foreign files
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); expected a state dict as a .pth or .safetensors file"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return state


def load_weights(model: UViT, state: dict[str, Tensor], source: str = "checkpoint") -> UViT:
    """Load a state dict with the published names into `model`, which is returned.

    Where only the image size differs, the patches' position embedding is interpolated, with a warning.

    Raises:
        UserError: keys that are missing, extra or of the wrong shape; all of them are named.
    """
    state = dict(state)
    ours = model.state_dict()
    if "pos_embed" in state.keys() & ours.keys() and state["pos_embed"].shape != ours["pos_embed"].shape:
        state["pos_embed"] = _resize_pos_embed(state["pos_embed"], ours["pos_embed"], model.extras)
    wrong = [
        f"{key}: expected {tuple(ours[key].shape)}, got {tuple(state[key].shape)}"
        for key in ours
        if key in state and state[key].shape != ours[key].shape
    ]
    missing, extra = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    if missing or extra or wrong:
        parts = [
            f"{len(keys)} {what} ({_some(keys)})"
            for what, keys in (("missing", missing), ("extra", extra), ("of the wrong shape", wrong))
            if keys
        ]
        raise UserError(f"{source} is of another architecture than the config: keys {', '.join(parts)}")
    model.load_state_dict(state)
    return model


def _some(keys: list[str], limit: int = 4) -> str:
    return "; ".join(keys[:limit]) + (f"; and {len(keys) - limit} more" if len(keys) > limit else "")


def _resize_pos_embed(old: Tensor, new: Tensor, extras: int) -> Tensor:
    """Interpolate the patch part of pos_embed (1, extras + n*n, D) bicubically; leave it alone where it cannot fit."""
    if old.dim() != 3 or old.shape[1] <= extras or old.shape[2] != new.shape[2]:
        return old
    n_old, n_new = (math.isqrt(p.shape[1] - extras) for p in (old, new))
    if n_old**2 != old.shape[1] - extras:
        return old
    warnings.warn(f"pos_embed: interpolated from {n_old}x{n_old} to {n_new}x{n_new} patches", stacklevel=3)
    grid = old[:, extras:].float().reshape(1, n_old, n_old, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(n_new, n_new), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(1, n_new**2, -1)
    return torch.cat([old[:, :extras], patches.to(old.dtype)], dim=1)
