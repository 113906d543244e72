"""How much a plan of cached layers saves, and the memory it needs, in a sentence."""

from collections.abc import Sequence

from uvit_fast.config import Config, ModelConfig
from uvit_fast.diffusion.caching import most_kept
from uvit_fast.diffusion.stages import Stage
from uvit_fast.model.cached import sublayers


def held_bytes(cfg: Config, stages: Sequence[Stage], images: int, guided: bool, width: int) -> int:
    """Return the bytes of the kept outputs, on top of the loop's memory: tokens times D for each, for both branches
    with guidance.

    Args:
        images: per batch. width: bytes per number, those of the weights.
    """
    model = cfg.model
    assert isinstance(model, ModelConfig)
    rows = images * (1 + guided)
    return most_kept(stage.layers for stage in stages) * rows * _tokens(model) * model.embed_dim * width


def cached_layers(cfg: Config, stages: Sequence[Stage], images: int, guided: bool, width: int) -> str:
    """Describe which share of all sublayer evaluations is reused, and the memory that this takes."""
    assert isinstance(cfg.model, ModelConfig)
    reused = sum(len(stage.layers.reuse) for stage in stages if stage.layers)
    share = reused / (len(stages) * len(sublayers(cfg.model.depth)))
    size = held_bytes(cfg, stages, images, guided, width) / 1e9
    both = ", both branches" if guided else ""
    what = f"{share:.0%} of the attentions and MLPs reuse an output"
    return f"cached layers: {what}; {size:.3g} GB for {images} images at a time{both}"


def sublayer_macs(cfg: Config) -> list[float]:
    """Return the multiply-adds of a block's attention and of its MLP, for one image."""
    model = cfg.model
    assert isinstance(model, ModelConfig)
    tokens, D = _tokens(model), model.embed_dim
    return [tokens * (4 * D**2 + 2 * tokens * D), tokens * 2 * D * int(D * model.mlp_ratio)]


def _tokens(model: ModelConfig) -> int:
    extras = 1 + bool(model.num_classes) + (model.context_tokens if model.context_dim else 0)
    return extras + (model.img_size // model.patch_size) ** 2
