"""U-ViT as a diffusers pipeline: `UViTPipeline.from_pretrained(folder)`, `pipe(class_labels=[207], num_inference_steps=50)`.

Needs the extra `diffusers`. Guidance here follows diffusers: `guidance_scale` is 1 + s for the paper's s, and 1 is none.
"""

from collections.abc import Callable
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
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.diffusion.samplers import Sampler
from uvit_fast.model.uvit import UViT
from uvit_fast.model.weights import load_weights


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
    ):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(scale_factor=scale_factor, null_label=null_label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | int | None = None,
        prompt: list[str] | str | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int], None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image a label or prompt; `num_images` of an unconditional model.

        Args:
            class_labels: of a class-conditional model. prompt: of a text-conditional one.
            num_inference_steps: network evaluations (NFE); default: the scheduler's.
            guidance_scale: 1 + s for the paper's s; 1 runs without guidance. Models without a null condition run without.
            generator: of the initial noise, and of the sampler's where it draws some.
            latents: (B, C, H, W), the initial noise itself.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the network's output space.
            callback: called as callback(done, steps) after each network evaluation.

        Raises:
            ValueError: a condition that the model does not take or misses, a class out of range, latents of another shape,
                fewer than one step, or an unknown output type.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale: expected at least 1 (no guidance), got {guidance_scale}")
        condition, null = self._condition(class_labels, prompt)
        batch = len(next(iter(condition.values()))) if condition else num_images
        net = self.model
        shape = (batch, net.in_chans, net.img_size, net.img_size)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents: expected {shape}, got {tuple(latents.shape)}")
        device = self._execution_device
        x_T = randn_tensor(shape, generator, device) if latents is None else latents.to(device)

        guided = guidance_scale > 1 and condition and None not in null.values()
        eps_fn = Guidance(net, condition, null, guidance_scale - 1) if guided else lambda x, t: net(x, t, **condition)
        sampler = self.scheduler.sampler(num_inference_steps)
        with self.progress_bar(total=len(sampler.stages)) as bar:

            def progress(done: int, steps: int) -> None:
                bar.update()
                if callback is not None:
                    callback(done, steps)

            of_batch = generator[0] if isinstance(generator, list) else generator
            x_0 = sampler(eps_fn, x_T, generator=of_batch, callback=progress)
        images = self._output(x_0, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _condition(self, class_labels, prompt) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The network's condition and its null, by argument name; both empty for an unconditional model."""
        net, device = self.model, self._execution_device
        wants = "prompt" if net.context_dim else "class_labels" if net.num_classes else None
        for name, value in (("class_labels", class_labels), ("prompt", prompt)):
            if (value is not None) != (name == wants):
                kind = {"prompt": "text", "class_labels": "classes", None: "no condition"}[wants]
                raise ValueError(f"{name}: the model takes {kind}; {'got' if value is not None else 'expected'} {name}")
        if wants == "class_labels":
            labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
            classes = net.num_classes - (self.config.null_label is not None)
            if not labels or not all(0 <= label < classes for label in labels):
                raise ValueError(f"class_labels: expected labels from 0 to {classes - 1}, got {labels}")
            return {"y": torch.tensor(labels, device=device)}, {"y": self.config.null_label}
        if wants == "prompt":
            features = self._encode([prompt] if isinstance(prompt, str) else list(prompt))
            return {"context": features}, {"context": self._encode([""])[0]}
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
            x_0 = self.vae.decode(x_0.to(self.vae.dtype) / self.config.scale_factor).sample
        images = (x_0.float() / 2 + 0.5).clamp(0, 1)  # (B, C, H, W)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
        if output_type == "np":
            return images
        pixels = np.round(images * 255).astype(np.uint8)
        return [Image.fromarray(p if p.shape[-1] == 3 else p[..., 0]) for p in pixels]


def make_pipeline(cfg: Config, weights: dict[str, Tensor], **components: Any) -> UViTPipeline:
    """The pipeline of a config and a state dict with the published names.

    Args:
        components: `vae` for a latent model; `text_encoder` and `tokenizer` for a text model.

    Raises:
        UserError: weights of another architecture.
    """
    if not isinstance(cfg.model, ModelConfig):
        raise UserError(f"{cfg.name}: pipelines are of U-ViT; a U-Net's weights are diffusers' own names after `net.`")
    model = load_weights(UViTModel(**cfg.model.model_dump()), weights)
    scheduler = UViTScheduler(cfg.diffusion.schedule, cfg.sample.sampler, cfg.sample.steps)
    factor = cfg.latent.scale_factor if cfg.latent else 1.0
    return UViTPipeline(model.eval(), scheduler, scale_factor=factor, null_label=cfg.null_label, **components)
