"""From a config and a checkpoint to a pipeline."""

from typing import Any

from torch import Tensor

from uvit_fast.config import Config, ModelConfig
from uvit_fast.data.autoencoders import Scaling, scaling_of
from uvit_fast.model.weights import load_weights
from uvit_fast.provenance import UNKNOWN, Provenance
from uvit_fast.runtime.errors import UserError

from .pipeline import UViTModel, UViTPipeline
from .schedulers import UViTScheduler


def make_pipeline(
    cfg: Config,
    weights: dict[str, Tensor],
    known: Provenance = UNKNOWN,
    license: str | None = None,
    **components: Any,
) -> UViTPipeline:
    """Return the pipeline of a config and a state dict with the published names.

    Args:
        known: the names of its classes, and the encoders that made its data.
        license: of the weights, for the model card.
        components: `vae` for a latent model; `text_encoder` and `tokenizer` for a text model.

    Raises:
        UserError: weights of another architecture.
    """
    if not isinstance(cfg.model, ModelConfig):
        raise UserError(f"{cfg.name}: pipelines are of U-ViT; a U-Net's weights are diffusers' own names after `net.`")
    model = load_weights(UViTModel(**cfg.model.model_dump()), weights)
    scheduler = (
        UViTScheduler(  # by keyword: diffusers takes other values for defaults, which another scheduler's config drops
            schedule=cfg.diffusion.schedule,
            sampler=cfg.sample.sampler,
            steps=cfg.sample.steps,
            spacing=cfg.sample.spacing,
            prediction=cfg.diffusion.prediction,
            shift=cfg.sample.shift,
        )
    )
    scaling = scaling_of(cfg, known, components.get("vae")) if cfg.latent else Scaling(1.0)
    scale = 1 + cfg.sample.guidance_scale
    names = dict(enumerate(known.classes)) or None
    return UViTPipeline(
        model.eval(), scheduler, **scaling.as_json(), null_label=cfg.null_label, guidance_scale=scale, id2label=names,
        encoders=known.encoders or None, license=license, **components,
    )  # fmt: skip
