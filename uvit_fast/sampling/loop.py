"""Sample from a trained model: conditions in, pixels or latents out, a batch at a time."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.build import build_sampler
from uvit_fast.config import Config
from uvit_fast.diffusion.guidance import EpsFn, Guidance
from uvit_fast.diffusion.noise import sample_generators, sample_noise
from uvit_fast.diffusion.stages import Sampler
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.model.uvit import UViT
from uvit_fast.runtime.ahead import ahead
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.sampling.conditions import check_guidance, check_labels


@torch.no_grad()
def sample(
    model: nn.Module,
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
    parts: list[range] | None = None,
    graphs: GraphSampler | None = None,
) -> Iterator[Tensor]:
    """Draw `num` samples, in batches: sample i depends on (seed, i) only, not on the batch size.

    Args:
        labels: (num,) classes, for class-conditional models.
        context, null_context: (num, T, C) text features, or a function from samples' indices to theirs (B, T, C), and
            those of "" (T, C), for text-conditional models.
        steps: network evaluations; default `cfg.sample.steps`.
        guidance_scale: the paper's s in cond + s (cond - uncond), 0 for none; diffusers' is 1 + s. Default
            `cfg.sample.guidance_scale`.
        guidance_interval: the times with guidance, see `Guidance`; default `cfg.sample.guidance_interval`.
        first: the index of the first sample, to continue an interrupted job.
        parts: the indices of each batch, ascending; default: `batch` at a time, from the first on.
        graphs: of the same model; replays the loop as a CUDA graph, and decodes if it has a decoder.

    Yields:
        (B, C, H, W) fp32 on the model's device: pixels in about [-1, 1], or latents times the scale factor.

    Raises:
        UserError: labels that the model does not have, or fewer than samples; guidance of a model that was trained
            without it; cached layers of a network other than a UViT.
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
    if cfg.sample.cache != "none" and not isinstance(model, UViT | Fp8UViT):
        raise UserError(
            f"sample.cache: expected a UViT as it is, got {type(model).__name__}; "
            "torch.compile and others run with none"
        )
    shape = (cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)
    if parts is None:
        parts = [range(start, min(start + batch, num)) for start in range(first, num, batch)]
    draw = partial(sample_noise, seed, shape=shape)
    # one batch's noise is drawn while the device computes another's
    for indices, x_T in zip(parts, ahead(draw, parts, threads=1) if len(parts) > 1 else map(draw, parts)):
        x_T = x_T.to(device)  # (B, C, H, W)
        rows = slice(indices.start, indices.stop)
        condition: dict[str, Tensor] = {}
        null: dict[str, Tensor | int | None] = {}
        if labels is not None:
            condition, null = {"y": labels[rows].to(device)}, {"y": cfg.null_label}
        elif context is not None:
            features = context(indices) if callable(context) else context[rows]
            condition, null = {"context": features.to(device)}, {"context": null_context}
        keys = sample_generators(seed, indices, device)
        yield solve(model, sampler, x_T, condition, null, scale, interval, keys, graphs)


def solve(
    model: nn.Module,
    sampler: Sampler,
    x_T: Tensor,
    condition: dict[str, Tensor],
    null: dict[str, Tensor | int | None],
    scale: float,
    interval: tuple[float, float],
    keys: Tensor,
    graphs: GraphSampler | None = None,
) -> Tensor:
    """Return the sampler's result from x_T (B, C, H, W), through `graphs` if given; the arguments are theirs."""
    if graphs is not None:
        return graphs(sampler, x_T, condition, null, scale, interval, keys=keys)
    eps_fn: EpsFn = Guidance(model, condition, null, scale, interval) if scale else partial(model, **condition)
    return sampler(eps_fn, x_T, generator=keys)


def check_finite(images: Tensor, what: str) -> Tensor:
    """Return the images, unless they are not finite and would be black.

    Raises:
        UserError: NaN or infinity among them.
    """
    if not torch.isfinite(images).all():
        raise UserError(
            f"{what} hold NaN or infinity; expected weights, guidance and a number of steps that give images"
        )
    return images
