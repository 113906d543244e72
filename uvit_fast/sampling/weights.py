"""Find the weights that a name means, and load the network that samples with them."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from uvit_fast import provenance
from uvit_fast.build import build_model
from uvit_fast.config import Config, ModelConfig
from uvit_fast.data.in_memory import CLASSES
from uvit_fast.model import fp8
from uvit_fast.model.unet import UNet
from uvit_fast.model.uvit import UViT
from uvit_fast.model.weights import load_weights, read_weights
from uvit_fast.provenance import Provenance, shown
from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling import rounding
from uvit_fast.training import checkpoint as checkpoints


def load_for_sampling(cfg: Config, checkpoint: str | Path, device: torch.device | str) -> UViT | UNet | fp8.Fp8UViT:
    """Return the network of `cfg` with the weights of a file, ready to sample, without gradients: in bf16 on a GPU,
    with its blocks' products in e4m3 if `cfg.sample.precision` says so; in fp32 on a CPU.

    Args:
        checkpoint: see `find_weights`.
        device: "cuda", for example.

    Raises:
        UserError: no such checkpoint, or one of another architecture or diffusion; FP8 where it cannot run; no such
            device.
    """
    device = as_device(device)
    path = find_weights(checkpoint)
    provenance_of(cfg, path)  # refuses another diffusion
    return load_found(cfg, path, device)


def load_found(cfg: Config, path: Path, device: torch.device) -> UViT | UNet | fp8.Fp8UViT:
    """`load_for_sampling` for a file that `find_weights` returned, and so has checked."""
    check_precision(cfg, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):  # initial values would take longer than reading the weights
        model = build_model(cfg).to(dtype)
    # checked and rounded on the device
    model = load_weights(model, read_weights(path), str(path), device).eval().requires_grad_(False)
    if cfg.sample.precision != "fp8":
        return model
    assert isinstance(model, UViT)
    narrow = fp8.Fp8UViT(model, keep=cfg.sample.fp8_keep)
    rounding.calibrate(narrow, cfg.diffusion.schedule, cfg.diffusion.prediction)
    return narrow


def check_precision(cfg: Config, device: torch.device) -> None:
    """Refuse FP8 where it cannot run.

    Raises:
        UserError: the kernels do not support the network or the device.
    """
    if cfg.sample.precision != "fp8":
        return
    if not isinstance(cfg.model, ModelConfig):
        raise UserError(f"sample.precision=fp8: its kernels are U-ViT's, {cfg.name} is a U-Net; expected bf16")
    fp8.check(cfg.model, device, cfg.sample.fp8_keep)


def find_weights(checkpoint: str | Path) -> Path:
    """Return the weight file that a path means: itself; for a run's folder, the EMA weights of its newest intact
    checkpoint, from which training would continue; for a checkpoint's folder or a run's best/, its EMA weights; for a
    pipeline's folder, its network; for another folder from the hub, such as DC-AE's, its only weight file.

    Warns of checkpoints that are skipped, and of damaged files beside the weights that were named.

    Raises:
        UserError: a folder that is none of these, a checkpoint's file without weights, or one that does not match its
            manifest.
    """
    path = Path(checkpoint)
    if path.name in ("exp_avg.safetensors", "exp_avg_sq.safetensors"):  # their tensors have the weights' names
        raise UserError(f"{path}: expected weights, as in ema.safetensors beside it; these are AdamW's moments")
    if path.is_dir() and (path / "model_index.json").is_file():
        network = path / "model"
        return next(_of_the_hub(network), network / "diffusion_pytorch_model.safetensors")
    if not path.is_dir():
        return _named(path)
    folder = path if checkpoints.steps(path) else path / "checkpoints"
    found = checkpoints.newest_intact(folder, lambda text: warnings.warn(text, stacklevel=4))
    file = (found[0] if found else path) / "ema.safetensors"
    if found and not file.is_file():
        raise UserError(f"{found[0]}: expected ema.safetensors, as training writes it; got none")
    if not found and checkpoints.step_of(path) is None and not file.is_file():
        if not (path / "manifest.json").is_file() and (named := next(_of_the_hub(path), None)):
            return named
        held = shown(sorted(file.name for file in path.iterdir())) or "nothing"
        raise UserError(
            f"{path}: no EMA weights, but {held}; "
            "expected checkpoints/step_*/ema.safetensors, which train.py writes, or one file of weights"
        )
    return file if found else _named(file)


def _of_the_hub(folder: Path) -> Iterator[Path]:
    """Yield the weight files in a folder as the hub's libraries write them, the safer ones first."""
    files = (
        folder / f"{name}{suffix}"
        for suffix in (".safetensors", ".bin")
        for name in ("model", "diffusion_pytorch_model", "pytorch_model")
    )
    return filter(Path.is_file, files)


def _named(file: Path) -> Path:
    """Return a file that a user named, verified by the checkpoint that it is part of."""
    if not file.is_file():
        why = "a link to nothing" if file.is_symlink() else "no such checkpoint file"
        raise UserError(f"{file}: {why}; expected a .pth or .safetensors file")
    folder = file.parent
    copied = folder.name.startswith(("step_", "damaged_step_")) and (folder / "manifest.json").is_file()
    wrong = dict(checkpoints.faults(folder)) if copied or checkpoints.step_of(folder) is not None else {}
    if file.name in wrong:
        raise UserError(f"{file}: damaged ({wrong[file.name]}); expected the file that training wrote")
    if wrong:
        said = "; ".join(": ".join(each) for each in wrong.items())
        warnings.warn(f"{folder} is damaged ({said}); {file.name}, which was asked for, is used", stacklevel=4)
    return file


def provenance_of(cfg: Config, weights: Path) -> Provenance:
    """Return what a model learned from, as recorded beside its weights, or as far as the names of its dataset's classes
    are known.

    Raises:
        UserError: the config's schedule or prediction is not the one that the model was trained with.
    """
    known, ours = provenance.read(weights), cfg.diffusion.meaning
    for key, there in known.diffusion.items():
        if ours.get(key, there) != there:
            raise UserError(
                f"{weights}: trained with diffusion.{key} {there}, but {cfg.name} has {ours[key]}; "
                f"expected diffusion.{key}={there}"
            )
    if cfg.model.num_classes and cfg.data.name in CLASSES:
        known = known.joined(Provenance(CLASSES[cfg.data.name]))
    return known
