"""U-ViT as a diffusers pipeline: `UViTPipeline.from_pretrained(folder)`, `pipe(class_labels=[207], num_inference_steps=50)`.

Needs the extra `diffusers`. Guidance here follows diffusers: `guidance_scale` is 1 + s for the paper's s, and 1 is none.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from uvit_fast.build import SAMPLERS, SCHEDULES
from uvit_fast.config import Config, ModelConfig, UserError
from uvit_fast.diffusion.cudagraph import GraphSampler
from uvit_fast.diffusion.guidance import ALWAYS, Guidance
from uvit_fast.diffusion.samplers import Sampler
from uvit_fast.model.uvit import UViT
from uvit_fast.model.weights import load_weights
from uvit_fast.provenance import UNKNOWN, Provenance
from uvit_fast.sampling import decoder


class UViTModel(UViT, ModelMixin, ConfigMixin):
    """A `UViT` that diffusers saves and loads; the same arguments and parameter names."""

    __init__ = register_to_config(UViT.__init__)


class UViTScheduler(SchedulerMixin, ConfigMixin):
    """A noise schedule and the sampler that goes with it, by the names of the YAML configs."""

    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(self, schedule: str = "sd", sampler: str = "dpmpp_fast", steps: int = 50):
        for value, names in ((schedule, SCHEDULES), (sampler, SAMPLERS)):
            if value not in names:
                raise ValueError(f"UViTScheduler: expected one of {', '.join(names)}, got {value!r}")

    def sampler(self, steps: int | None = None) -> Sampler:
        """The sampler for `steps` network evaluations; default: those that the model was published with."""
        return SAMPLERS[self.config.sampler](SCHEDULES[self.config.schedule](), steps or self.config.steps)


class UViTPipeline(DiffusionPipeline):
    """Images from a U-ViT.

    Args:
        model, scheduler: the network and how it is sampled.
        vae: the autoencoder of a latent model, else None.
        text_encoder, tokenizer: CLIP ViT-L/14 of a text model, else None.
        scale_factor: what latents are multiplied with before the network (0.18215; 0.23010 for COCO).
        null_label: the label that means none, of a model trained with label dropping, else None.
        guidance_scale: the default of a call, 1 + s for the s that the model was published with.
        id2label: the classes' names by label, as DiT's pipeline has them; None where they are not known.
    """

    model_cpu_offload_seq = "text_encoder->model->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        model: UViTModel,
        scheduler: UViTScheduler,
        vae: AutoencoderKL | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scale_factor: float = 0.18215,
        null_label: int | None = None,
        guidance_scale: float = 1.0,
        id2label: dict[int, str] | None = None,
    ):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            scale_factor=scale_factor, null_label=null_label, guidance_scale=guidance_scale, id2label=id2label
        )
        names = {int(label): name for label, name in (id2label or {}).items()}  # JSON's keys are texts
        self._known = Provenance(tuple(names.get(label, str(label)) for label in range(max(names, default=-1) + 1)))
        self._graphs: GraphSampler | None = None

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The labels of classes' names.

        Raises:
            ValueError: no class is called so.
        """
        return [self._known.label(name) for name in ([label] if isinstance(label, str) else label)]

    def enable_cuda_graphs(self, max_bytes: int | None = None) -> None:
        """Replay each loop as one captured CUDA graph from its second call on: a small batch is several times as fast. The first call
        of each number of steps, size and kind of guidance captures; a call with a callback runs uncaptured.

        Args:
            max_bytes: bound on the memory of all captures; default: half of the device's.
        """
        self._graphs = GraphSampler(self.model, max_bytes=max_bytes)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int | str] | int | str | None = None,
        prompt: list[str] | str | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = ALWAYS,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int], None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image a label or prompt; `num_images` of an unconditional model.

        Args:
            class_labels: of a class-conditional model, or their names. prompt: of a text-conditional one.
            num_inference_steps: network evaluations (NFE); default: the scheduler's.
            guidance_scale: 1 + s for the paper's s, as in diffusers; 1 runs without guidance; default: the pipeline's, which is
                what its model was published with.
            guidance_interval: guide at the times t in [0, 1] (0: data) that lie inside (Kynkaanniemi et al. 2024).
            generator: of the initial noise, and of the sampler's where it draws some; with one a sample, image i depends on the
                i-th alone.
            latents: (B, C, H, W), the initial noise itself.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the network's output space.
            callback: called as callback(done, steps) after each network evaluation.

        Raises:
            ValueError: a condition that the model does not take or misses, a class out of range, latents of another shape,
                fewer than one step or image, guidance of a model without a null condition, an unknown output type, or a component
                that is not there.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
        if num_inference_steps is not None:
            num_inference_steps = _whole("num_inference_steps", num_inference_steps)
        num_images = _whole("num_images", num_images)
        if output_type != "latent" and self.vae is None and self.config.scale_factor != 1:
            raise ValueError(f"output_type {output_type!r}: the pipeline has no vae to decode with; expected 'latent'")
        s = (self.config.guidance_scale if guidance_scale is None else guidance_scale) - 1  # the paper's
        if not 0 <= s < math.inf:
            raise ValueError(f"guidance_scale: expected at least 1 (no guidance), got {guidance_scale}")
        condition, null = self._condition(class_labels, prompt, guided=s > 0)
        if s > 0 and (not condition or None in null.values()):
            raise ValueError(f"guidance_scale: the model has no null condition; expected 1 (no guidance), got {1 + s}")
        batch = len(next(iter(condition.values()))) if condition else num_images
        if num_images not in (1, batch):
            raise ValueError(f"num_images: expected one image a label or prompt, {batch}, got {num_images}")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: expected one, or one a sample, {batch}, got {len(generator)}")
        net = self.model
        shape = (batch, net.in_chans, net.img_size, net.img_size)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents: expected {shape}, got {tuple(latents.shape)}")
        device = self._execution_device
        x_T = randn_tensor(shape, generator, device) if latents is None else latents.to(device)
        sampler = self.scheduler.sampler(num_inference_steps)
        keys = _keys(generator, batch).to(device) if sampler.draws_noise else None

        if self._graphs is not None and callback is None:
            if self._graphs.model is not net:  # the component was exchanged
                self.enable_cuda_graphs(self._graphs.max_bytes)
            x_0 = self._graphs(sampler, x_T, condition, null, s, guidance_interval, keys)
        else:
            with self.progress_bar(total=len(sampler.stages)) as bar:

                def progress(done: int, steps: int) -> None:
                    bar.update()
                    if callback is not None:
                        callback(done, steps)

                eps_fn = Guidance(net, condition, null, s, guidance_interval) if s else partial(net, **condition)
                x_0 = sampler(eps_fn, x_T, generator=keys, callback=progress)
        images = self._output(x_0, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _condition(self, class_labels, prompt, guided: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The network's condition and, where `guided`, its null, by argument name; both empty for an unconditional model."""
        net, device = self.model, self._execution_device
        wants = "prompt" if net.context_dim else "class_labels" if net.num_classes else None
        for name, value in (("class_labels", class_labels), ("prompt", prompt)):
            if (value is not None) != (name == wants):
                kind = {"prompt": "text", "class_labels": "classes", None: "no condition"}[wants]
                raise ValueError(f"{name}: the model takes {kind}; {'got' if value is not None else 'expected'} {name}")
        if wants == "class_labels":
            several = isinstance(class_labels, Sequence | Tensor | np.ndarray) and np.ndim(class_labels)
            classes = net.num_classes - (self.config.null_label is not None)
            each = class_labels if several else [class_labels]
            labels = [self._known.label(v) if isinstance(v, str) else _whole("class_labels", v, least=0) for v in each]
            if not labels or not all(label < classes for label in labels):
                raise ValueError(f"class_labels: expected labels from 0 to {classes - 1}, got {labels}")
            return {"y": torch.tensor(labels, device=device)}, {"y": self.config.null_label}
        if wants == "prompt":
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts:
                raise ValueError("prompt: expected at least one, got none")
            if self.tokenizer is None or self.text_encoder is None:
                raise ValueError("prompt: the pipeline has no tokenizer and text_encoder; expected both as components")
            return {"context": self._encode(prompts)}, {"context": self._encode([""])[0] if guided else None}
        return {}, {}

    def _encode(self, prompts: list[str]) -> Tensor:
        """CLIP's last hidden state, padded to the model's tokens, no mask: (B, T, C)."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.model.context_tokens, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(self._execution_device)).last_hidden_state

    def _output(self, x_0: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x_0
        if self.vae is not None:
            x_0 = decoder(self.vae, self.config.scale_factor)(x_0)
        images = (x_0.float() / 2 + 0.5).clamp(0, 1)  # (B, C, H, W)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
        if output_type == "np":
            return images
        pixels = np.round(images * 255).astype(np.uint8)
        return [Image.fromarray(p if p.shape[-1] == 3 else p[..., 0]) for p in pixels]


def _whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number, of Python's, NumPy's or torch's kind."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def _keys(generator: torch.Generator | list[torch.Generator] | None, batch: int) -> Tensor:
    """(batch,) int64 keys of the samples' own noise: all of one generator, or one of each."""

    def draw(g: torch.Generator | None, count: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (count,), generator=g, device=g.device if g else "cpu")

    return torch.cat([draw(g, 1) for g in generator]) if isinstance(generator, list) else draw(generator, batch)


def make_pipeline(
    cfg: Config,
    weights: dict[str, Tensor],
    known: Provenance = UNKNOWN,
    **components: Any,
) -> UViTPipeline:
    """The pipeline of a config and a state dict with the published names.

    Args:
        known: the names of its classes.
        components: `vae` for a latent model; `text_encoder` and `tokenizer` for a text model.

    Raises:
        UserError: weights of another architecture.
    """
    if not isinstance(cfg.model, ModelConfig):
        raise UserError(f"{cfg.name}: pipelines are of U-ViT; a U-Net's weights are diffusers' own names after `net.`")
    model = load_weights(UViTModel(**cfg.model.model_dump()), weights)
    scheduler = UViTScheduler(cfg.diffusion.schedule, cfg.sample.sampler, cfg.sample.steps)
    factor = cfg.latent.scale_factor if cfg.latent else 1.0
    scale = 1 + cfg.sample.guidance_scale
    names = dict(enumerate(known.classes)) or None
    return UViTPipeline(
        model.eval(), scheduler, scale_factor=factor, null_label=cfg.null_label, guidance_scale=scale, id2label=names,
        **components,
    )  # fmt: skip
