"""The trainer's preview of its EMA weights: a grid of samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from uvit_fast.config import Config
from uvit_fast.data.autoencoders import load_decoder
from uvit_fast.data.encoders import load_text
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.device import pick_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.conditions import chosen_labels, spread, spread_labels
from uvit_fast.sampling.images import save_grid, to_uint8
from uvit_fast.sampling.loop import sample


def training_preview(cfg: Config, known: Provenance) -> Callable[[nn.Module, int, Path], Path] | None:
    """Return what the trainer calls every `train.sample_every` steps, which makes a grid of 64 samples, eight per row,
    with the names of their classes; None if that is 0.

    Raises:
        UserError, ImportError: latents cannot be decoded here, or a text model has no prompts or its encoder is
            missing: before training, not after hours.
    """
    if not cfg.train.sample_every:
        return None
    device, captions = pick_device(cfg.device), None
    conditions: dict[str, Any] = {}
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

    def preview(model: nn.Module, step: int, folder: Path) -> Path:
        batches = sample(model, cfg, 64, batch=64, **conditions)
        path = folder / f"step_{step:08d}.png"
        save_grid(to_uint8(torch.cat([decode(x) for x in batches])), path, columns=8, captions=captions)
        return path

    return preview
