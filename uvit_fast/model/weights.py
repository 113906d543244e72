"""Read and load weights: the published `.pth` checkpoints and our own safetensors hold the same names."""

import argparse
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PosixPath
from typing import Any, TypeVar, cast

import numpy as np
import numpy._core.multiarray as multiarray
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import cut

Network = TypeVar("Network", bound=nn.Module)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a `.pth` (loaded with weights_only, which runs no code from the file) or `.safetensors`
    file, on the CPU.

    Of a training checkpoint's several state dicts, return the EMA weights, else the weights; a warning says what the
    file holds.

    Raises:
        UserError: the file does not exist or holds no state dict; the message says what it holds and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; expected a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_harmless()),
        ):
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise various kinds for truncated and foreign files
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name or "TorchScript" in str(error):
            what = f"{cut(name[1])}, a Python object" if name else "a TorchScript program"
            raise UserError(
                f"{path}: holds {what} that is not loaded since it could run code; expected a state dict of tensors, "
                "which whoever trusts the file can load with weights_only=False and save alone"
            ) from None
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); "
            "expected a state dict as a .pth or .safetensors file"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a state dict of tensors, got {type(tree).__name__}")
    if tree and all(isinstance(value, Tensor) for value in tree.values()):
        return tree
    found = dict(_state_dicts(tree))
    held = _some([cut(str(key)) for key in tree], 8) or "nothing"
    if not found:
        raise UserError(f"{path}: expected a state dict of tensors, got a dict of {held}")
    chosen = min(found, key=_preference)
    taken = ".".join(map(str, chosen)) or "what is not within another"
    warnings.warn(f"{path}: holds {held}; the weights taken are {cut(taken)}", stacklevel=2)
    return {key: value for key, value in found[chosen].items() if isinstance(key, str) and isinstance(value, Tensor)}


def _harmless() -> list[Any]:
    """List what training scripts keep beside weights and what unpickling only fills: arguments, paths, NumPy scalars
    and arrays.
    """
    types = [argparse.Namespace, PosixPath, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    makers = [getattr(multiarray, name) for name in ("scalar", "_reconstruct")]
    rooms = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2
    return types + [(maker, f"{room}.{maker.__name__}") for maker in makers for room in rooms]


def load_weights(
    model: Network, state: dict[str, Tensor], source: str = "checkpoint", device: torch.device | str | None = None
) -> Network:
    """Load a state dict with the published names into `model` and return it; `published_names` says which names fit.

    Where only the image size differs, the patches' position embedding is interpolated, with a warning. A network on the
    meta device gets copies of the values, in its own dtypes.

    Args:
        device: that checks the values and, of a network on the meta device, keeps them; default: theirs.

    Raises:
        UserError: keys that are missing, unexpected or of the wrong shape, all of them named; NaN or infinity.
    """
    ours = model.state_dict()
    state = published_names(state, ours, source)
    if "pos_embed" in state.keys() & ours.keys() and state["pos_embed"].shape != ours["pos_embed"].shape:
        state["pos_embed"] = _resize_pos_embed(state["pos_embed"], ours["pos_embed"], cast(Any, model).extras)
    refuse_misfits(ours, state, source)
    for what, is_wrong, expected in (
        ("without values of their own (sparse or meta)", _has_no_values, "dense ones, of a model that was not on meta"),
        ("of whole or complex numbers", lambda t: not t.is_floating_point(), "real ones, as before a quantisation"),
        ("with NaN or infinity", _is_not_finite, "those from before the training diverged"),
    ):
        if wrong := [key for key in ours if is_wrong(state[key])]:
            raise UserError(
                f"{source}: {len(wrong)} of {len(ours)} tensors are {what} ({_some(wrong)}); expected {expected}"
            )
        if device is not None and is_wrong is _has_no_values:
            state = {key: state[key].to(device) for key in ours}
    if any(value.is_meta for value in ours.values()):
        # copies: what safetensors reads is the mapped file itself, which may be overwritten
        model.load_state_dict({key: state[key].to(ours[key].dtype, copy=True) for key in ours}, assign=True)
    else:
        model.load_state_dict(state)
    return model


def refuse_misfits(ours: dict[str, Tensor], state: dict[str, Tensor], source: str, advice: str = "") -> None:
    """Refuse a state dict whose names or shapes differ from `ours`.

    Raises:
        UserError: keys that are missing, unexpected or of the wrong shape, all of them named, followed by `advice`.
    """
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
        raise UserError(f"{source} is of another architecture than the config: tensors {', '.join(parts)}{advice}")


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.layout is not torch.strided


def _is_not_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return False
    # NaN or infinity is among the extremes, which need no memory, unlike isfinite of all; types of one byte have none
    wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return not torch.stack(wide.aminmax()).isfinite().all()


def published_names(state: dict[str, Tensor], ours: Collection[str], source: str = "checkpoint") -> dict[str, Tensor]:
    """Return a state dict by the published names, whatever wrapped the network: DDP, an EMA, `torch.compile`, FSDP, or
    a larger module such as DC-AE's `diffusion_model.`, whose other parts are left out. A warning names the prefix that
    was removed.

    Args:
        ours: the network's names.
    """
    dotless = {name.replace(".", ""): name for name in ours}
    renamed = {_dotted(_unwrapped(key), dotless): value for key, value in state.items()}
    state = renamed if len(renamed) == len(state) else dict(state)
    prefix = _prefix(state, ours)
    if not prefix:
        return state
    others = [key for key in state if not key.startswith(prefix)]
    left_out = f"; what else there is ({_some(others, 2)}) is left out" if others else ""
    warnings.warn(f"{source}: names begin with {prefix!r}, which is dropped{left_out}", stacklevel=3)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _unwrapped(key: str) -> str:
    """Return a name without the parts that wrappers insert, and DC-AE's label table by its published name."""
    key = re.sub(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+", r"\1", str(key))
    return re.sub(r"(^|\.)label_emb\.embedding_table\.weight$", r"\1label_emb.weight", key)


def _dotted(key: str, dotless: dict[str, str]) -> str:
    """Return a name of latent diffusion's EMA, which keeps names without their dots, with those of ours."""
    head, dot, tail = key.rpartition(".")
    if "ema" in head.lower():
        for i in range(len(tail)):
            if name := dotless.get(tail[i:]):
                return f"{head}{dot}{tail[:i]}{'.' if i else ''}{name}"
    return key


def _prefix(state: dict[str, Tensor], ours: Collection[str]) -> str:
    """Return the prefix of at least half of our names, an EMA's if there are several; "" where they have none or are
    missing.
    """
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in ours:
                counts["".join(f"{part}." for part in parts[:i])] += 1
                break  # the longest name
    best = max(counts, key=lambda prefix: (counts[prefix], "ema" in prefix.lower(), not prefix), default="")
    return best if 2 * counts[best] >= len(ours) else ""


def _state_dicts(tree: dict, at: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """Yield the dicts within a nested one that hold tensors by parameter names, except an optimizer's, with the keys
    that lead there.
    """
    if any(isinstance(key, str) and "." in key and isinstance(value, Tensor) for key, value in tree.items()):
        yield at, tree
    for key, value in tree.items():
        if isinstance(value, dict) and len(at) < 4 and not re.search("optim|^opt|exp_avg", str(key).lower()):
            yield from _state_dicts(value, (*at, key))


def _preference(path: tuple) -> tuple:
    """Sort EMAs first, of several the one with the largest decay; then by what weights are usually called."""
    name = ".".join(map(str, path)).lower()
    usual = ("ema", "shadow", "state_dict", "model", "module")
    decay = max((float(number) for number in re.findall(r"0\.\d+", name)), default=0.0)
    return next((i for i, word in enumerate(usual) if word in name), len(usual)), -decay


def _some(keys: list[str], limit: int = 4) -> str:
    return "; ".join(keys[:limit]) + (f"; and {len(keys) - limit} more" if len(keys) > limit else "")


def _resize_pos_embed(old: Tensor, new: Tensor, extras: int) -> Tensor:
    """Interpolate the patch part of pos_embed (1, extras + n*n, D) bicubically; leave it unchanged if it cannot fit."""
    if old.dim() != 3 or old.shape[1] <= extras or old.shape[2] != new.shape[2]:
        return old
    n_old, n_new = (math.isqrt(p.shape[1] - extras) for p in (old, new))
    if n_old**2 != old.shape[1] - extras:
        return old
    warnings.warn(f"pos_embed: interpolated from {n_old}x{n_old} to {n_new}x{n_new} patches", stacklevel=3)
    return torch.cat([old[:, :extras], interpolated(old[:, extras:], n_new)], dim=1)


def interpolated(patches: Tensor, side: int) -> Tensor:
    """Interpolate position embeddings (1, n * n, D) of n * n patches bicubically to side * side."""
    n = math.isqrt(patches.shape[1])
    grid = patches.float().reshape(1, n, n, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, side**2, -1).to(patches.dtype)
