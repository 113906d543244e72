"""The weights that a name means, and the network that samples with them."""

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
from uvit_fast.runtime.errors import UserError
from uvit_fast.training import checkpoint as checkpoints


def load_for_sampling(cfg: Config, checkpoint: str | Path, device: torch.device) -> UViT | UNet | fp8.Fp8UViT:
    """The network of `cfg` with the weights of a file, ready to sample: bf16 on a GPU, its blocks' products e4m3 where
    `cfg.sample.precision` says so; fp32 on a CPU; no gradients.

    Args:
        checkpoint: as `find_weights` takes it.

    Raises:
        UserError: no such checkpoint, or one of another architecture or diffusion; FP8 where it cannot run.
    """
    path = find_weights(checkpoint)
    provenance_of(cfg, path)  # of another diffusion it refuses
    return load_found(cfg, path, device)


def load_found(cfg: Config, path: Path, device: torch.device) -> UViT | UNet | fp8.Fp8UViT:
    """`load_for_sampling` of the file that `find_weights` gave, which has looked at it."""
    check_precision(cfg, device)
    with torch.device("meta"):  # initial values would take longer than reading these
        model = build_model(cfg)
    model = load_weights(model, read_weights(path), source=str(path))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model.to(device, dtype).eval().requires_grad_(False)
    if cfg.sample.precision != "fp8":
        return model
    assert isinstance(model, UViT)
    return fp8.Fp8UViT(model, keep=cfg.sample.fp8_keep)


def check_precision(cfg: Config, device: torch.device) -> None:
    """Refuse FP8 where it cannot run.

    Raises:
        UserError: of another network, or on another device, than its kernels are for.
    """
    if cfg.sample.precision != "fp8":
        return
    if not isinstance(cfg.model, ModelConfig):
        raise UserError(f"sample.precision=fp8: its kernels are U-ViT's, {cfg.name} is a U-Net; expected bf16")
    fp8.check(cfg.model, device, cfg.sample.fp8_keep)


def find_weights(checkpoint: str | Path) -> Path:
    """The weight file that a name means: itself; of a run's folder, the EMA weights of its newest intact checkpoint,
    which is the one that training would continue from; of a checkpoint's or a run's best/, its EMA weights; of a
    pipeline's folder, its network; of another folder of the hub, such as DC-AE's, its one file of weights.

    Warns of checkpoints that are passed over, and where other files are damaged than those of the weights that were
    named.

    Raises:
        UserError: a folder that is none of these, a checkpoint's file that holds no weights, or one that is not as its
            manifest says.
    """
    path = Path(checkpoint)
    if path.name in ("exp_avg.safetensors", "exp_avg_sq.safetensors"):  # under the weights' names
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
            f"{path}: no EMA weights, but {held}; expected checkpoints/step_*/ema.safetensors, which train.py writes, or one file of weights"
        )
    return file if found else _named(file)


def _of_the_hub(folder: Path) -> Iterator[Path]:
    """The files of weights in a folder as the hub's libraries write them, the safer ones first."""
    files = (
        folder / f"{name}{suffix}"
        for suffix in (".safetensors", ".bin")
        for name in ("model", "diffusion_pytorch_model", "pytorch_model")
    )
    return filter(Path.is_file, files)


def _named(file: Path) -> Path:
    """A file that a user named, looked at as the checkpoint says that it is in."""
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
    """What a model learned from, as it is written beside its weights, or as the names of its dataset's classes are
    known.

    Raises:
        UserError: the config takes the network's output, or its noise levels, for something else than it was trained
            on.
    """
    known, ours = provenance.read(weights), cfg.diffusion.meaning
    for key, there in known.diffusion.items():
        if ours.get(key, there) != there:
            raise UserError(
                f"{weights}: trained with diffusion.{key} {there}; expected it, got {ours[key]} in {cfg.name}"
            )
    if cfg.model.num_classes and cfg.data.name in CLASSES:
        known = known.joined(Provenance(CLASSES[cfg.data.name]))
    return known
