"""U-ViT as a diffusers pipeline: `UViTPipeline.from_pretrained(folder)`, `pipe(class_labels=[207],
num_inference_steps=50)`.

Needs the extra `diffusers`. Guidance follows diffusers here: `guidance_scale` is 1 + s for the paper's s, and 1 is
none.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from torch import Tensor

from uvit_fast.data.autoencoders import Scaling, check_vae, compression, decoder
from uvit_fast.data.encoders import check_text_encoder, quiet_diffusers
from uvit_fast.diffusion.guidance import ALWAYS, Guidance
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.model.uvit import UViT
from uvit_fast.provenance import Provenance
from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.sampling.loop import check_finite
from uvit_fast.sampling.rounding import calibrate

from . import folder, schedulers
from .calls import INSTEAD, StepEnd, is_text, new_keys, of_each, whole
from .conditions import condition_of
from .model_card import FOLDER, model_card
from .schedulers import UViTScheduler, usual_prediction

STEPS = 50  # with a scheduler of diffusers, unless the call says how many
quiet_diffusers()


class UViTModel(UViT, ModelMixin, ConfigMixin):
    """A `UViT` that diffusers can save and load; same arguments, same parameter names."""

    __init__ = register_to_config(UViT.__init__)


class UViTPipeline(DiffusionPipeline):
    """Sample images from a U-ViT.

    Args:
        model, scheduler: the network, and how to sample it.
        vae: the autoencoder of a latent model, else None.
        text_encoder, tokenizer: CLIP ViT-L/14 of a text model, else None.
        scale_factor, shift_factor: the network sees (latents - shift_factor) * scale_factor; one number each, or one
            per channel (0.18215 and 0; 0.23010 for COCO).
        null_label: the null label of a model trained with label dropping, else None.
        guidance_scale: the default of a call, 1 + s for the s that the model was published with.
        id2label: the classes' names by label, as in DiT's pipeline; None if unknown.
        schedule: the model's noise schedule, "sd", "vp", "flow" or "flow_sit", to which a scheduler of diffusers is
            fitted; default: the scheduler's.
        prediction: what the model predicts, "eps", "v", "x0" or "velocity"; default: the scheduler's, else the
            schedule's usual one.
        encoders: identities of the autoencoder and text encoder that made the training data, if known.
        license: of the weights, in the hub's terms ("mit", "apache-2.0"); None if unknown. It goes into the model card.

    Raises:
        ValueError: a vae or text_encoder that is not one of these.
    """

    model_cpu_offload_seq = "text_encoder->model->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        model: UViTModel,
        scheduler: Any,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scale_factor: float | list[float] = 0.18215,
        null_label: int | None = None,
        guidance_scale: float = 1.0,
        id2label: dict[int, str] | dict[str, str] | None = None,
        schedule: str | None = None,
        encoders: dict[str, dict[str, str]] | None = None,
        shift_factor: float | list[float] = 0.0,
        prediction: str | None = None,
        license: str | None = None,
    ):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        schedule = schedule or scheduler.config.get("schedule")
        prediction = prediction or scheduler.config.get("prediction") or (schedule and usual_prediction(schedule))
        self.register_to_config(
            scale_factor=scale_factor,
            shift_factor=shift_factor,
            null_label=null_label,
            guidance_scale=guidance_scale,
            id2label=id2label,
            schedule=schedule,
            prediction=prediction,
            encoders=encoders,
            license=license,
        )
        names = {int(label): name for label, name in (id2label or {}).items()}  # JSON's keys are strings
        classes = tuple(names.get(label, str(label)) for label in range(max(names, default=-1) + 1))
        self._known = Provenance(classes, encoders or {})
        for check, component in ((check_vae, vae), (check_text_encoder, text_encoder)):
            if isinstance(component, torch.nn.Module) and not any(p.is_meta for p in component.parameters()):
                check(component, str(getattr(component, "name_or_path", "")) or "of the pipeline", self._known)
        self._card = ""  # of the folder saved last
        self._graphs: GraphSampler | None = None
        self._fp8: tuple[tuple, Fp8UViT] | None = None  # with the identity of the weights it was derived from
        self._interrupt, self._guidance_scale, self._num_timesteps = False, guidance_scale, 0  # of the current call

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names, by label; empty if unknown."""
        return self._known.classes

    @property
    def latent(self) -> bool:
        """Whether the model samples an autoencoder's latents."""
        return self.vae is not None or self.scaling != Scaling(1.0)

    @property
    def scaling(self) -> Scaling:
        """The scaling of latents for the network."""
        parts = (self.config.scale_factor, self.config.shift_factor)
        return Scaling(*(tuple(part) if isinstance(part, list | tuple) else part for part in parts))

    @property
    def image_size(self) -> int:
        """Height = width of the images."""
        return self.model.img_size * (compression(self.vae) if self.vae is not None else 8 if self.latent else 1)

    @property
    def interrupt(self) -> bool:
        """Whether the current call ends after this step: set `pipe._interrupt` in its `callback_on_step_end`."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """The current call's: set `pipe._guidance_scale` in its `callback_on_step_end` for the following steps."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the current call, or steps of a scheduler of diffusers."""
        return self._num_timesteps

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return a folder's index without its mention of code in the folder, which is therefore not run."""
        return folder.without_code(super()._dict_from_json_file(*args, **kwargs) | {"_class_name": cls.__name__})

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the folder's index, what diffusers' own `DiffusionPipeline` needs to load it, and a model card if there
        is none yet.
        """
        super().save_config(save_directory, *args, **kwargs)
        folder.add_code(Path(save_directory), self.config_name, type(self).__name__)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            card.write_text(model_card(self), "utf-8")
        self._card = card.read_text("utf-8")

    def _upload_folder(self, working_dir: str | Path, repo_id: str, token: Any = None, **kwargs: Any) -> Any:
        """Upload a saved folder, for `push_to_hub` and `save_pretrained(..., push_to_hub=True)`. If the repository has
        no card yet, diffusers has put a generic one into the folder: upload the folder's own instead, with the
        repository's name.
        """
        try:
            ModelCard.load(repo_id, token=token)
        except (EntryNotFoundError, RepositoryNotFoundError):
            (Path(working_dir) / "README.md").write_text(self._card.replace(FOLDER, repo_id), "utf-8")
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the labels of classes' names.

        Raises:
            ValueError: no class has that name.
        """
        return [self._known.label(name) for name in ([label] if isinstance(label, str) else label)]

    def enable_cuda_graphs(self, max_bytes: int | None = None) -> None:
        """Replay each loop as one captured CUDA graph from its second call on, rather than each evaluation of the
        network. The first call with a number of steps, a size and a kind of guidance captures; a call with a callback
        runs step by step.

        Args:
            max_bytes: bound on the memory of all captures; default: half of the device's.
        """
        self._graphs = GraphSampler(self.model, max_bytes=max_bytes)

    def _network(self, precision: str) -> UViT | Fp8UViT:
        """Return the network that a call evaluates. FP8 weights are derived at the first call, and again if the model's
        have changed.
        """
        if precision != "fp8":
            return self.model
        weights = tuple((p.data_ptr(), p._version) for p in self.model.parameters())
        if self._fp8 is None or self._fp8[0] != weights:
            narrow, ours = Fp8UViT(self.model), self.scheduler if isinstance(self.scheduler, UViTScheduler) else self
            if ours.config.schedule:
                calibrate(narrow, ours.config.schedule, ours.config.prediction)
            self._fp8 = weights, narrow
        return self._fp8[1]

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
        negative_prompt: list[str] | str | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        precision: str = "bf16",
        **others: Any,
    ) -> ImagePipelineOutput | tuple:
        """Sample `num_images_per_prompt` images per label or prompt; `num_images` times as many from an unconditional
        model.

        Args:
            class_labels: labels or class names, for a class-conditional model. prompt: for a text-conditional one; may
                also be passed first.
            num_inference_steps: network evaluations (NFE); default: the scheduler's. With a scheduler of diffusers: in
                its own count, by default 50.
            guidance_scale: 1 + s for the paper's s, as in diffusers; 1: no guidance; default: the pipeline's, with
                which its model was published.
            guidance_interval: guide at the times t in [0, 1] (0: data) inside it (Kynkaanniemi et al. 2024).
            generator: of the initial noise, and of the sampler's, if it draws any; with one per sample, image i depends
                on the i-th alone.
            latents: (B, C, H, W), the initial noise itself.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the network's
                output space.
            callback: called as callback(done, steps) after each network evaluation.
            negative_prompt: what guidance leads away from, one or one per prompt; default: "", as published.
            prompt_embeds, negative_prompt_embeds: (B, T, C) text features that replace either prompt.
            height, width: of the images; only the model's own size is accepted.
            eta: of DDIMScheduler.
            callback_on_step_end: called as callback_on_step_end(pipe, i, t, {"latents": x}) after each evaluation, or
                step of a scheduler of diffusers; "latents" in the dictionary that it returns replaces the state.
            precision: "bf16": the model as it is. "fp8": e4m3 operands in its blocks' matrix products; for a model in
                bfloat16, on compute capability 9.0.

        Raises:
            ValueError: a condition that the model does not take or that is missing, a class out of range, latents of
                the wrong shape, fewer than one step or image, guidance of a model without a null condition, an unknown
                output type, a missing component, a scheduler that does not fit the model, or an unknown argument.
            UserError: FP8 where it cannot run.
        """
        for name in others:
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            hint = INSTEAD.get(name) or (near and f"did you mean {near[0]}?") or f"expected {', '.join(ARGUMENTS)}"
            raise ValueError(f"{name}: the pipeline takes no such argument; {hint}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
        if precision not in ("bf16", "fp8"):
            raise ValueError(f"precision: expected bf16 or fp8, got {precision!r}")
        if num_inference_steps is not None:
            num_inference_steps = whole("num_inference_steps", num_inference_steps)
        num_images, each = whole("num_images", num_images), whole("num_images_per_prompt", num_images_per_prompt)
        if output_type != "latent" and self.vae is None and self.latent:
            raise ValueError(f"output_type {output_type!r}: the pipeline has no vae to decode with; expected 'latent'")
        for name, value in (("height", height), ("width", width)):
            if value not in (None, size := self.image_size):
                raise ValueError(f"{name}: the model makes images of {size} x {size}; expected {size}, got {value}")
        s = (self.config.guidance_scale if guidance_scale is None else guidance_scale) - 1  # the paper's
        if not 0 <= s < math.inf:
            raise ValueError(f"guidance_scale: expected at least 1 (no guidance), got {guidance_scale}")
        if self.model.context_dim and prompt is None and is_text(class_labels):
            class_labels, prompt = None, class_labels
        texts = {
            "prompt": prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt": negative_prompt,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        condition, null = condition_of(self, class_labels, texts, guided=s > 0)
        if s > 0 and (not condition or None in [v for v in null.values() if not isinstance(v, Tensor)]):
            raise ValueError(f"guidance_scale: the model has no null condition; expected 1 (no guidance), got {1 + s}")
        given = len(next(iter(condition.values()))) if condition else num_images
        if num_images not in (1, given):
            raise ValueError(f"num_images: expected one image per label or prompt, {given}, got {num_images}")
        batch = given * each
        condition = {name: value.repeat_interleave(each, 0) for name, value in condition.items()}
        null = {n: v.repeat_interleave(each, 0) if of_each(v) else v for n, v in null.items()}
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: expected one, or one per sample, {batch}, got {len(generator)}")
        net = self.model
        shape = (batch, net.in_chans, net.img_size, net.img_size)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents: expected {shape}, got {tuple(latents.shape)}")
        device = self._execution_device
        x_T = randn_tensor(shape, generator, device) if latents is None else latents.to(device)

        network = self._network(precision)
        eps_fn = Guidance(network, condition, null, s, guidance_interval) if s else partial(network, **condition)
        step_end = StepEnd(self, callback_on_step_end, callback_on_step_end_tensor_inputs, eps_fn)
        self._guidance_scale = 1 + s
        if not isinstance(self.scheduler, UViTScheduler):
            x_0 = self._solve_with_others(eps_fn, x_T, num_inference_steps or STEPS, generator, eta, callback, step_end)
        else:
            if eta:
                raise ValueError(f"eta: UViTScheduler takes none; expected 0, got {eta}")
            sampler = self.scheduler.sampler(num_inference_steps)
            self._num_timesteps = len(sampler.stages)
            keys = new_keys(generator, batch).to(device) if sampler.draws_noise else None
            watched = callback is not None or callback_on_step_end is not None
            if self._graphs is not None and not watched and not any(map(of_each, null.values())):
                if self._graphs.model is not network:  # the component or the precision was changed
                    self._graphs = GraphSampler(network, max_bytes=self._graphs.max_bytes)
                x_0 = self._graphs(sampler, x_T, condition, null, s, guidance_interval, keys)
            else:
                times = [torch.tensor(stage.time) for stage in sampler.stages]
                with self.progress_bar(total=len(times)) as bar:

                    def progress(done: int, steps: int) -> None:
                        bar.update()
                        if callback is not None:
                            callback(done, steps)

                    x_0 = step_end.until_interrupted(
                        lambda: sampler(eps_fn, x_T, keys, progress, lambda i, x: step_end(i, times[i], x))
                    )
        images = self._output(x_0, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _solve_with_others(
        self, eps_fn: Any, x_T: Tensor, steps: int, generator, eta: float, callback, step_end
    ) -> Tensor:
        """Solve uncaptured, with the scheduler of diffusers that replaced ours."""
        scheduler, schedule = self.scheduler, self.config.schedule
        if schedule is None:
            raise ValueError(
                "scheduler: the model's noise schedule is not known; "
                "expected a pipeline made with schedule='sd', 'vp' or 'flow'"
            )
        prediction = self.config.prediction
        schedulers.check(scheduler, schedule, self.latent, prediction)
        with self.progress_bar(total=steps) as bar:

            def change(i: int, t: Tensor, x: Tensor) -> Tensor:
                bar.total = self._num_timesteps = len(scheduler.timesteps)  # some count twice
                bar.update()
                if callback is not None:
                    callback(i + 1, len(scheduler.timesteps))
                return step_end(i, t, x)

            return step_end.until_interrupted(
                lambda: schedulers.solve(scheduler, schedule, steps, eps_fn, x_T, generator, eta, change, prediction)
            )

    def _output(self, x_0: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return check_finite(x_0, "the samples")
        if self.vae is not None:
            x_0 = decoder(self.vae, self.scaling)(x_0)
        check_finite(x_0, "the images")
        images = (x_0.float() / 2 + 0.5).clamp(0, 1)  # (B, C, H, W)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
        if output_type == "np":
            return arrays
        pixels = np.round(arrays * 255).astype(np.uint8)
        return [Image.fromarray(p if p.shape[-1] == 3 else p[..., 0]) for p in pixels]


ARGUMENTS = [name for name in inspect.signature(UViTPipeline.__call__).parameters if name not in ("self", "others")]
