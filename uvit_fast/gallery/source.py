"""One checkpoint of a gallery: its possible settings, and what of it is loaded."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit_fast.build import SAMPLERS
from uvit_fast.config import Config, ModelConfig, config_from
from uvit_fast.data.autoencoders import load_decoder
from uvit_fast.data.encoders import load_text, text_encoder_name
from uvit_fast.gallery.recipe import Precision, Recipe, checked
from uvit_fast.model import fp8
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.sampling.conditions import chosen_labels

FIXED = (
    "spacing",
    "shift",
    "guidance_interval",
    "cache",
)  # of a config's section sample; the page does not change them


@dataclass(frozen=True)
class Choices:
    """The possible settings of one checkpoint.

    Attributes:
        classes: name and label of each class that it learned; empty without classes.
        text: whether it takes a prompt.
        guided: whether it was trained for guidance.
        start: the config's own settings.
    """

    classes: list[tuple[str, int]]
    text: bool
    guided: bool
    samplers: list[str]
    precisions: list[Precision]
    start: Recipe


@dataclass
class Source:
    """One checkpoint, and what of it is loaded."""

    name: str
    cfg: Config
    path: Path
    known: Provenance
    device: torch.device
    clip: str | None
    networks: dict[str, Any] = field(default_factory=dict)  # by precision
    graphs: dict[tuple[str, bool], GraphSampler] = field(default_factory=dict)  # by precision; for one picture, or more

    @cached_property
    def digest(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @cached_property
    def decode(self) -> Callable[[Tensor], Tensor]:
        return load_decoder(self.cfg, self.device, self.known) if self.cfg.latent else lambda x: x

    @cached_property
    def text(self) -> tuple[Callable[[list[str]], Tensor], Tensor]:
        name = self.clip or text_encoder_name(self.cfg, self.known)
        return load_text(self.cfg, name, self.device, self.known)

    @cached_property
    def choices(self) -> Choices:
        cfg, sample = self.cfg, self.cfg.sample
        labels = chosen_labels(None, cfg, self.known) if cfg.model.num_classes else []
        precisions: list[Precision] = ["fp32"] if self.device.type == "cpu" else ["bf16"]
        if self._takes_fp8():
            precisions.append("fp8")
        start = checked(
            checkpoint=self.name,
            label=labels[0] if labels else None,
            prompt=next(iter(sample.prompts), "") if cfg.model.context_dim else None,
            seed=0,
            cfg_scale=1 + sample.guidance_scale,
            steps=sample.steps,
            sampler=sample.sampler,
            precision=sample.precision if sample.precision in precisions else precisions[0],
        )
        return Choices(
            [(self.known.name(label), label) for label in labels],
            bool(cfg.model.context_dim),
            cfg.train.p_uncond > 0,
            [name for name in SAMPLERS if _can(partial(self.config, name))],
            precisions,
            start,
        )

    @property
    def fixed(self) -> dict[str, Any]:
        """What the config decides about a picture beside its recipe; of a plan's file only the name."""
        said = self.cfg.sample.model_dump(mode="json", include=set(FIXED))
        return said | {"cache": Path(said["cache"]).name}

    def _takes_fp8(self) -> bool:
        model, sampler = self.cfg.model, self.cfg.sample.sampler
        if not isinstance(model, ModelConfig):
            return False
        return _can(lambda: fp8.check(model, self.device)) and _can(lambda: self.config(sampler, "fp8"))

    def config(self, sampler: str, precision: str | None = None) -> Config:
        """Return the config with another sampler and precision.

        Raises:
            UserError: that sampler does not fit this diffusion.
        """
        changed = {"sample.sampler": sampler} | ({"sample.precision": "fp8"} if precision == "fp8" else {})
        changed |= {"sample.precision": "bf16"} if precision in ("fp32", "bf16") else {}
        return config_from(self.cfg.model_dump(mode="json"), Path(self.name), changed)


def _can(does: Callable[[], object]) -> bool:
    try:
        does()
    except UserError:
        return False
    return True
