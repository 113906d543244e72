"""Weights in and out: the published `.pth` checkpoints and our own safetensors hold the same names."""

import argparse
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from uvit_fast.config import UserError
from uvit_fast.model.uvit import UViT
from uvit_fast.text import cut


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a `.pth` (loaded with weights_only, which runs no code of the file's) or `.safetensors` file, on the CPU.

    Raises:
        UserError: no such file, or one that holds something else than a state dict: what it holds, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; expected a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):  # only to say that it is there
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise their own kinds for truncated and foreign files
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name or "TorchScript" in str(error):
            what = f"{cut(name[1])}, a Python object" if name else "a TorchScript program"
            raise UserError(
                f"{path}: holds {what} that is not loaded since it could run code; expected a state dict of tensors, which "
                "whoever trusts the file can load with weights_only=False and save alone"
            ) from None
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); expected a state dict as a .pth or .safetensors file"
        ) from None
    if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
        return state
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    held = ", ".join(cut(str(key)) for key in list(state)[:8]) or "nothing"
    within = [
        key for key, value in state.items() if isinstance(value, dict) and any(map(torch.is_tensor, value.values()))
    ]
    if not within:
        raise UserError(f"{path}: expected a state dict of tensors, got a dict of {held}")
    wanted = next((key for key in within if "ema" in str(key).lower()), within[0])
    safe = "False" if any(isinstance(value, argparse.Namespace) for value in state.values()) else "True"
    raise UserError(
        f"{path}: a training checkpoint, which holds {held}; expected the weights alone, as "
        f"torch.save(torch.load({path.name!r}, 'cpu', weights_only={safe})[{wanted!r}], 'weights.pth') writes them"
    )


def load_weights(model: UViT, state: dict[str, Tensor], source: str = "checkpoint") -> UViT:
    """Load a state dict with the published names into `model`, which is returned.

    Where only the image size differs, the patches' position embedding is interpolated, with a warning.

    Raises:
        UserError: keys that are missing, extra or of the wrong shape, all of which are named, or that have a prefix; NaN or infinity.
    """
    state = dict(state)
    ours = model.state_dict()
    if prefix := _prefix(state, ours):
        raise UserError(
            f"{source}: its keys begin with {prefix!r}, as those of a wrapped model do; expected them without: "
            f"{{key.removeprefix({prefix!r}): value for key, value in state.items()}}"
        )
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
    for what, is_wrong, expected in (
        ("without values of their own (sparse or meta)", _has_no_values, "dense ones, of a model that was not on meta"),
        ("of whole or complex numbers", lambda t: not t.is_floating_point(), "real ones, as before a quantisation"),
        ("with NaN or infinity", lambda t: not t.isfinite().all(), "those from before the training diverged"),
    ):
        if wrong := [key for key in ours if is_wrong(state[key])]:
            raise UserError(
                f"{source}: {len(wrong)} of {len(ours)} tensors are {what} ({_some(wrong)}); expected {expected}"
            )
    model.load_state_dict(state)
    return model


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.layout is not torch.strided


def _prefix(state: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
    """What stands before each of our names in a state dict that has them all; "" where nothing does."""
    first = next(iter(ours))
    prefixes = [key.removesuffix(first) for key in state if str(key).endswith(f".{first}")]
    return next((prefix for prefix in prefixes if all(prefix + key in state for key in ours)), "")


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
