"""Samples from a trained model: conditions in, images out. Used by the commands, the demo and the training previews."""

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvit_fast import provenance
from uvit_fast.build import build_model, build_sampler
from uvit_fast.config import CLIP, Config, UserError
from uvit_fast.data.datasets import CLASSES
from uvit_fast.data.encoders import check_vae, load_pretrained, load_text_encoder, quiet_diffusers
from uvit_fast.diffusion.cudagraph import GraphSampler
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.noise import sample_generators, sample_noise
from uvit_fast.extras import missing
from uvit_fast.files import file_name, write_whole
from uvit_fast.images import as_picture, save_grid, to_uint8
from uvit_fast.model.uvit import UViT
from uvit_fast.model.weights import load_weights, read_weights
from uvit_fast.provenance import UNKNOWN, Provenance, shown
from uvit_fast.training import checkpoint as checkpoints


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


def load_for_sampling(cfg: Config, checkpoint: str | Path, device: torch.device) -> UViT:
    """The network of `cfg` with the weights of a file, ready to sample: bf16 on a GPU, fp32 on a CPU, no gradients.

    Args:
        checkpoint: as `find_weights` takes it.

    Raises:
        UserError: no such checkpoint, or one of another architecture.
    """
    return load_found(cfg, find_weights(checkpoint), device)


def load_found(cfg: Config, path: Path, device: torch.device) -> UViT:
    """`load_for_sampling` of the file that `find_weights` gave, which has looked at it."""
    model = load_weights(build_model(cfg), read_weights(path), source=str(path))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device, dtype).eval().requires_grad_(False)


def find_weights(checkpoint: str | Path) -> Path:
    """The weight file that a name means: itself; of a run's folder, the EMA weights of its newest intact checkpoint, which is the one
    that training would continue from; of a checkpoint's or a run's best/, its EMA weights; of a pipeline's folder, its network.

    Warns of checkpoints that are passed over, and where other files are damaged than those of the weights that were named.

    Raises:
        UserError: a folder that is none of these, a checkpoint's file that holds no weights, or one that is not as its manifest says.
    """
    path = Path(checkpoint)
    if path.name in ("exp_avg.safetensors", "exp_avg_sq.safetensors"):  # under the weights' names
        raise UserError(f"{path}: expected weights, as in ema.safetensors beside it; these are AdamW's moments")
    if path.is_dir() and (path / "model_index.json").is_file():
        return path / "model" / "diffusion_pytorch_model.safetensors"
    if not path.is_dir():
        return _named(path)
    folder = path if checkpoints.steps(path) else path / "checkpoints"
    found = checkpoints.newest_intact(folder, lambda text: warnings.warn(text, stacklevel=4))
    file = (found[0] if found else path) / "ema.safetensors"
    if found and not file.is_file():
        raise UserError(f"{found[0]}: expected ema.safetensors, as training writes it; got none")
    if not found and checkpoints.step_of(path) is None and not file.is_file():
        held = shown(sorted(file.name for file in path.iterdir())) or "nothing"
        raise UserError(
            f"{path}: no EMA weights, but {held}; expected checkpoints/step_*/ema.safetensors, which train.py writes, or one file of weights"
        )
    return file if found else _named(file)


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
    """What a model learned from, as it is written beside its weights, or as the names of its dataset's classes are known."""
    known = provenance.read(weights)
    if cfg.model.num_classes and cfg.data.name in CLASSES:
        known = known.joined(Provenance(CLASSES[cfg.data.name]))
    return known


def chosen_labels(text: str | None, cfg: Config, known: Provenance) -> list[int]:
    """The labels that a text names, as `Provenance.labels` takes it; None: all that the model has learned.

    Raises:
        UserError: a class that the model does not have, or of which it saw nothing; a model without classes.
    """
    if text is not None and not cfg.model.num_classes:
        raise UserError(f"classes {text}: the model of {cfg.name} is not class-conditional")
    rows = cfg.model.num_classes - (cfg.null_label is not None)
    learned = min(rows, len(known.classes) or rows)  # a model may have more rows than its data had classes
    labels = list(range(learned)) if text is None else check_labels(known.labels(text, rows), cfg)
    if unseen := [label for label in labels if label >= learned]:
        raise UserError(f"classes: the model saw labels from 0 to {learned - 1} only, got {shown(map(str, unseen))}")
    return labels


def check_labels(labels: list[int], cfg: Config) -> list[int]:
    """Refuse labels that the model does not have; the null label is not a class."""
    classes = cfg.model.num_classes - (cfg.null_label is not None)
    if not cfg.model.num_classes:
        raise UserError(f"classes {labels}: the model of {cfg.name} is not class-conditional")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise UserError(f"classes: expected labels from 0 to {classes - 1}, got {', '.join(map(str, wrong))}")
    return labels


def check_guidance(scale: float, cfg: Config) -> None:
    """Refuse a scale, the paper's s, that is no number of at least 0, or of a model that has no unconditional branch."""
    if not 0 <= scale < math.inf:
        raise UserError(f"guidance: expected a scale of at least 0 (none), got {scale:g}")
    if scale > 0 and cfg.train.p_uncond == 0:
        raise UserError(
            f"guidance: {cfg.name} was trained without dropping its condition; expected a scale of 0 (none), got {scale:g}"
        )


@torch.no_grad()
def sample(
    model: UViT,
    cfg: Config,
    num: int,
    *,
    labels: Tensor | None = None,
    context: Tensor | Callable[[range], Tensor] | None = None,
    null_context: Tensor | None = None,
    seed: int = 0,
    batch: int = 50,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    first: int = 0,
    graphs: GraphSampler | None = None,
) -> Iterator[Tensor]:
    """Draw `num` samples, in batches: sample i depends on (seed, i) only, not on the batch size.

    Args:
        labels: (num,) classes, of a class-conditional model.
        context, null_context: (num, T, C) text features, or a function from samples' indices to theirs (B, T, C), and (T, C) those
            of "", of a text-conditional model.
        steps: network evaluations; default `cfg.sample.steps`.
        guidance_scale: the paper's s in cond + s (cond - uncond), 0 for none; diffusers counts 1 + s. Default
            `cfg.sample.guidance_scale`.
        guidance_interval: the times with guidance, as `Guidance` takes them; default `cfg.sample.guidance_interval`.
        first: the index of the first sample, to continue an interrupted job.
        graphs: of the same model; replays the loop as a CUDA graph, and decodes where it was told how.

    Yields:
        (B, C, H, W) fp32 on the model's device: pixels in about [-1, 1], or latents times the scale factor.

    Raises:
        UserError: labels that the model does not have, or fewer than samples; guidance of a model that was trained without it.
    """
    if labels is not None:
        if len(labels) < num:
            raise UserError(f"labels: expected one for each of {num} samples, got {len(labels)}")
        check_labels(labels[first:num].unique().tolist(), cfg)
    device = next(model.parameters()).device
    sampler = build_sampler(cfg, steps)
    scale = cfg.sample.guidance_scale if guidance_scale is None else guidance_scale
    interval = cfg.sample.guidance_interval if guidance_interval is None else guidance_interval
    check_guidance(scale, cfg)
    shape = (cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)
    for start in range(first, num, batch):
        indices = range(start, min(start + batch, num))
        x_T = sample_noise(seed, indices, shape).to(device)  # (B, C, H, W)
        rows = slice(start, start + len(indices))
        condition, null = {}, {}
        if labels is not None:
            condition, null = {"y": labels[rows].to(device)}, {"y": cfg.null_label}
        elif context is not None:
            features = context(indices) if callable(context) else context[rows]
            condition, null = {"context": features.to(device)}, {"context": null_context}
        keys = sample_generators(seed, indices, device)
        if graphs is not None:
            yield graphs(sampler, x_T, condition, null, scale, interval, keys=keys)
        else:
            eps_fn = Guidance(model, condition, null, scale, interval) if scale else partial(model, **condition)
            yield sampler(eps_fn, x_T, generator=keys)


def check_finite(images: Tensor, what: str) -> Tensor:
    """The images, unless they would be black ones.

    Raises:
        UserError: NaN or infinity among them.
    """
    if not torch.isfinite(images).all():
        raise UserError(
            f"{what} hold NaN or infinity; expected weights, guidance and a number of steps that give images"
        )
    return images


def spread(num: int, items: list) -> list:
    """`num` items that go through `items` in equal shares, in their order."""
    return [items[i * len(items) // num] for i in range(num)]


def spread_labels(num: int, classes: list[int]) -> Tensor:
    """(num,) labels that go through `classes` in equal shares, sorted as a grid shows them."""
    return torch.tensor(spread(num, classes))


def training_preview(cfg: Config, known: Provenance) -> Callable[[UViT, int, Path], Path] | None:
    """What the trainer calls every `train.sample_every` steps: a grid of 64 samples, eight a row, with the names of their classes;
    None where it is 0.

    Raises:
        UserError, ImportError: latents cannot be decoded here, or a model of text has no prompts or not its encoder. Before training,
            not after hours.
    """
    if not cfg.train.sample_every:
        return None
    device, conditions, captions = pick_device(cfg.device), {}, None
    decode = load_decoder(cfg, device, known) if cfg.latent else lambda x: x
    if cfg.model.context_dim:
        if not cfg.sample.prompts:
            raise UserError(
                "train.sample_every: previews of a text model need sample.prompts; expected some, or 0 for no previews"
            )
        captions = spread(64, list(cfg.sample.prompts))
        encode, null = load_text(cfg, None, device, known)
        features = dict(zip(cfg.sample.prompts, encode(list(cfg.sample.prompts))))  # kept, unlike the encoder
        conditions = {"context": torch.stack([features[prompt] for prompt in captions]), "null_context": null}
    elif cfg.model.num_classes:
        conditions = {"labels": spread_labels(64, chosen_labels(None, cfg, known))}
        captions = [known.name(label) for label in conditions["labels"].tolist()]

    def preview(model: UViT, step: int, folder: Path) -> Path:
        batches = sample(model, cfg, 64, batch=64, **conditions)
        path = folder / f"step_{step:08d}.png"
        save_grid(to_uint8(torch.cat([decode(x) for x in batches])), path, columns=8, captions=captions)
        return path

    return preview


def load_decoder(cfg: Config, device: torch.device, known: Provenance = UNKNOWN) -> Callable[[Tensor], Tensor]:
    """The frozen autoencoder of `cfg.latent`, as `decoder` makes it: bf16 on a GPU, fp32 on a CPU.

    Args:
        known: what the model learned from, whose latents it must be able to decode.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        UserError: the autoencoder is neither a local folder nor to be had from the hub, or it is one of other latents.
    """
    vae = load_autoencoder(cfg.latent.decoder, known)
    vae = vae.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return decoder(vae, cfg.latent.scale_factor)


def decoder(vae: Any, scale_factor: float, chunk: int = 25) -> Callable[[Tensor], Tensor]:
    """A function from latents (B, C, h, w) to pixels (B, 3, 8h, 8w) fp32 in about [-1, 1].

    Args:
        vae: diffusers' `AutoencoderKL`.
        scale_factor: what latents were multiplied with.
        chunk: latents at a time, whatever the sampling batch: activations at the images' size are what takes the memory.
    """

    def decode(z: Tensor) -> Tensor:
        parts = (z.to(vae.dtype) / scale_factor).split(chunk)
        return torch.cat([vae.decode(part).sample.float() for part in parts])

    return decode


def text_encoder_name(cfg: Config, known: Provenance) -> str:
    """The config's text encoder, else the one that made what the model learned from, else the published models'."""
    asked = cfg.latent.text_encoder if cfg.latent else None
    return asked or known.encoders.get("text_encoder", {}).get("name") or CLIP


def load_text(
    cfg: Config, name: str | None, device: torch.device, known: Provenance = UNKNOWN
) -> tuple[Callable[[list[str]], Tensor], Tensor]:
    """The text encoder of a text-conditional model: captions -> features (B, T, C) fp32, and those of "", (T, C).

    Args:
        name: CLIP, a local folder or a hub name; None: as `text_encoder_name` says.
        known: what the model learned from, whose text encoder it must be.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        UserError: the encoder cannot be had, its features do not fit the model, or it is not the one that the model learned from.
    """
    name = name or text_encoder_name(cfg, known)
    encode = load_text_encoder(name, device, known)
    null, expected = encode([""])[0], (cfg.model.context_tokens, cfg.model.context_dim)
    if null.shape != expected:
        raise UserError(f"text encoder {name}: {cfg.name} expected features {expected}, got {tuple(null.shape)}")
    return encode, null


def load_autoencoder(name: str, known: Provenance = UNKNOWN) -> Any:
    """diffusers' `AutoencoderKL` by a local folder, or owner/repository[/subfolder] on the hub; fp32, frozen, on the CPU.

    Args:
        known: what a model learned from, where it shall be an autoencoder of its latents.

    Raises:
        ImportError, UserError: as `load_decoder`.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise missing("an autoencoder of latents", "diffusers", "diffusers") from None
    quiet_diffusers()
    where, parts = {"pretrained_model_name_or_path": name}, name.split("/")
    if not Path(name).is_dir() and len(parts) > 2:
        where = {"pretrained_model_name_or_path": "/".join(parts[:2]), "subfolder": "/".join(parts[2:])}
    vae = load_pretrained("autoencoder", name, partial(AutoencoderKL.from_pretrained, **where))
    check_vae(vae, name, known)
    return vae.eval().requires_grad_(False)


def sample_names(labels: list[int] | None, prompts: list[str] | None, known: Provenance) -> list[str] | None:
    """What the samples' files are called after their numbers: class207_otter, or class207 where it has no name; or of the prompt
    what a file's name can hold. None where there is neither.
    """
    if labels is None:
        return prompts and [file_name(prompt) for prompt in prompts]
    numbers = {label: f"class{label}" for label in set(labels)}
    named = {i: file_name(known.name(i)) if known.name(i) != str(i) else "" for i in numbers}
    return ["_".join(filter(None, (numbers[label], named[label]))) for label in labels]


def save_pngs(folder: Path, batches: Iterable[np.ndarray], names: list[str] | None, first: int = 0) -> None:
    """One PNG an image of batches (B, H, W, C) uint8, numbered from `first`: 000000.png, or 000000_name.png where samples have `names`."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(numbered: tuple[int, np.ndarray]) -> None:
        i, image = numbered
        name = f"{i:06d}" + (f"_{names[i]}" if names and names[i] else "")
        as_picture(image).save(folder / f"{name}.png")

    with ThreadPoolExecutor() as pool:  # compression leaves Python's lock
        for images in batches:
            list(pool.map(save, enumerate(images, first)))
            first += len(images)


def save_npz(path: Path, batches: Iterable[np.ndarray], num: int, labels: np.ndarray | None) -> None:
    """ADM's sample file: arr_0 uint8 (N, H, W, C), arr_1 int64 labels where there are some.

    Args:
        batches: of `num` images together, (B, H, W, C) uint8 each; one at a time is in memory.
    """

    def write(temporary: Path) -> None:
        written = 0
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                for images in batches:
                    if not written:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (num, *images.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.ascontiguousarray(images, np.uint8).data)
                    written += len(images)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, labels)
        assert written == num

    write_whole(path, write)
