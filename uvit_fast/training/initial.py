"""What a new run starts from if `train.init` names weights, parts of which `train.init_replace` replaces."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
import yaml
from torch import Tensor

from uvit_fast import provenance
from uvit_fast.config import Config
from uvit_fast.model.weights import interpolated, load_weights, published_names, read_weights, refuse_misfits
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World
from uvit_fast.sampling.weights import find_weights
from uvit_fast.training import checkpoint
from uvit_fast.training.checkpoint import Tensors

TABLES = ("label_emb.weight", "net.class_embedding.weight")  # label embeddings: U-ViT's, the U-Nets'
SEEN = {"img_size", "in_chans", "patch_size", "num_classes", "context_dim", "context_tokens", "conv"}  # from shapes


class Start(NamedTuple):
    """The initial weights of a run.

    Attributes:
        weights: every parameter of the network, fp32, on the CPU.
        record: for the run's folder: the file, its SHA-256, the replaced parts.
        line: for the log.
    """

    weights: Tensors
    record: dict[str, Any]
    line: str


def start_of(
    config: Config, model: nn.Module, data: Provenance, run_dir: Path, fresh: bool, world: World
) -> Start | None:
    """Call `read_start` on rank 0 for a run without a checkpoint to continue from, or one that is to begin anew; return
    None otherwise.

    Raises:
        UserError: as `read_start`, on every rank.
    """
    found: list[Start] = []
    if config.train.init and (fresh or not checkpoint.steps(run_dir / "checkpoints")):
        world.on_first(lambda: found.append(read_start(config, model, data)))
    return found[0] if found else None


def read_start(config: Config, model: nn.Module, data: Provenance) -> Start:
    """Read `train.init` into `model`, whose own values stay where something is begun anew.

    Args:
        data: what the labels and latents of the run's data mean.

    Raises:
        UserError: the weights do not exist or do not fit; the message says how `train.init_replace` would help.
    """
    try:
        file = find_weights(str(config.train.init))
        state = published_names(read_weights(file), model.state_dict(), str(file))
    except UserError as error:
        raise UserError(f"train.init: {error}") from None
    names, known = config.train.init_replace, provenance.read(file)
    before = {"diffusion": known.diffusion, **_config_of(file)}
    drops = before.get("train", {}).get("p_uncond", 1) > 0  # assumed of a bare file, as in the published ones
    state, replaced = replace(model, state, names, config.null_label is not None and drops, str(file))
    source = f"train.init: {file}"
    refuse_misfits(model.state_dict(), state, source, _advice(model, state, names))
    load_weights(model, state, source)
    digest = checkpoint.sha256(file)
    if any(_within(table, name) for table in TABLES for name in names):
        known = dataclasses.replace(known, classes=())  # its labels are gone
    others = checkpoint.other_meaning(config.model_dump(mode="json"), before, SEEN)
    others += filter(None, [known.difference(data)])
    said = [f"starts from {file} (SHA-256 {digest[:12]})", *replaced]
    said += [f"unlike where they were trained: {', '.join(others)}"] if others else []
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Start(weights, {"file": str(file), "sha256": digest, "replaced": replaced}, "; ".join(said))


def replace(
    model: nn.Module, given: Tensors, names: Collection[str], nulls: bool, source: str
) -> tuple[Tensors, list[str]]:
    """Return `given` with the parts that `names` name replaced for `model`, and a description of what was done.

    The label embedding keeps its last row if that is the null label, unless "null_label" is named too; `pos_embed` is
    interpolated, and keeps the tokens that both have; everything else is taken from `model`, and dropped if it is not
    there.

    Args:
        names: of parameters or modules.
        nulls: whether the last label is the null label in both.

    Raises:
        UserError: a name that matches nothing.
    """
    ours, state, said = model.state_dict(), dict(given), []
    for name in names:
        tables = TABLES if name == "null_label" and nulls else ()
        keys = [key for key in sorted(ours.keys() | given.keys()) if _within(key, name) or key in tables]
        if not keys:
            known = sorted({key.partition(".")[0] for key in ours}) + ["null_label"] * nulls
            raise UserError(
                f"train.init_replace: expected some of {', '.join(known)}, or names within these, got {name}, which "
                f"neither the config's network nor {source} has"
            )
        for key in keys:
            old, new = state.pop(key, None), ours.get(key)
            how = "is left out" if new is None else "begins anew"
            if old is not None and new is not None:
                if name == "null_label":
                    new = torch.cat([old[:-1], new[-1:].to(old)]) if old.shape == new.shape else old
                elif key == "pos_embed":
                    new, how = _positions(model, given, new)
                elif key in TABLES and nulls and "null_label" not in names and old.shape[1:] == new.shape[1:]:
                    new, how = torch.cat([new[:-1], old[-1:].to(new)]), "begins anew, but for the null label"
            if new is not None:
                state[key] = new
        said.append(f"{name} {how}")
    return state, said


def _positions(model: nn.Module, given: Tensors, new: Tensor) -> tuple[Tensor, str]:
    """Return the position embedding (1, extras + n * n, D) for `model`, and how it was made; else the old one."""
    old = given["pos_embed"]
    tokens = [f"text {i}" for i in range(cast(int, model.context_tokens))]
    theirs = ["label"] * ("label_emb.weight" in given) + ["time"] + tokens * ("context_embed.weight" in given)
    ours = ["label"] * bool(model.num_classes) + ["time"] + tokens * bool(model.context_dim)
    n_old = math.isqrt(max(old.shape[1] - len(theirs), 0)) if old.dim() == 3 else 0
    if not n_old or n_old**2 != old.shape[1] - len(theirs) or old.shape[2] != new.shape[2]:
        return old, "does not fit"
    extras = new[:, : len(ours)].clone()
    for i, token in enumerate(ours):
        if token in theirs:
            extras[:, i] = old[:, theirs.index(token)]
    n_new = math.isqrt(new.shape[1] - len(ours))
    patches = interpolated(old[:, len(theirs) :], n_new)
    how = f"is interpolated from {n_old}x{n_old} to {n_new}x{n_new} patches" if n_new != n_old else "keeps its patches"
    return torch.cat([extras, patches], dim=1), how


def _advice(model: nn.Module, state: Tensors, named: Collection[str]) -> str:
    """Return what to name in `train.init_replace`, beside what is `named`, if the rest is still useful: if the blocks
    and most other parameters fit.
    """
    ours, nothing = model.state_dict(), torch.empty(0)
    misfits = [k for k in ours.keys() | state.keys() if ours.get(k, nothing).shape != state.get(k, nothing).shape]
    depth = 2 if len({key.partition(".")[0] for key in ours}) == 1 else 1  # a network inside another module
    names = sorted({".".join(key.split(".")[:depth]) for key in misfits})
    blocks = getattr(model, "block_class", ())
    held = {name.partition(".")[0] for name, module in model.named_modules() if isinstance(module, blocks)}
    if held & set(names) or 2 * len(misfits) > len(ours):
        return ""
    return f"; train.init_replace=[{','.join(dict.fromkeys([*named, *names]))}] would replace what does not fit"


def _config_of(file: Path) -> dict[str, Any]:
    """Return the sections of the config that weights were trained with, as far as they are stored beside them."""
    for path, of in (
        (file.with_name("manifest.json"), lambda tree: tree["config"]),
        (file.parent.parent / "config.yaml", dict),  # of a run's best/
        (file.with_name("config.json"), lambda tree: {"model": dict(tree)}),  # a pipeline's network
    ):
        try:
            return of(yaml.safe_load(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            continue
    return {}


def _within(key: str, name: str) -> bool:
    """Return whether a parameter has that name, or belongs to the module of that name."""
    return key == name or key.startswith(f"{name}.")
