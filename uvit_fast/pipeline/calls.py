"""The arguments of a pipeline call, and a user's callback in it."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uvit_fast.diffusion.guidance import EpsFn, Guidance

INSTEAD = {  # arguments of diffusers' other pipelines -> what to use here
    "batch_size": "expected num_images",
    "timesteps": "expected num_inference_steps, or another scheduler",
    "sigmas": "expected num_inference_steps, or another scheduler",
    "image": "it draws from noise alone",
    "strength": "it draws from noise alone",
    "clip_skip": "the model was trained on CLIP's last layer",
    "guidance_rescale": "its guidance is cond + s (cond - uncond); expected guidance_scale",
    "cross_attention_kwargs": "the model has no cross-attention",
    "ip_adapter_image": "the model takes no images",
    "ip_adapter_image_embeds": "the model takes no images",
    "prompt_2": "there is one text encoder; expected prompt",
    "negative_prompt_2": "there is one text encoder; expected negative_prompt",
    "callback_steps": "expected callback_on_step_end",
}


class _Interrupted(Exception):
    """Raised inside a callback to end the loop."""


class StepEnd:
    """A user's `callback_on_step_end`, as the loops call it with each new state."""

    def __init__(self, pipe: Any, callback: Callable | None, inputs: Sequence[str], eps_fn: EpsFn):
        inputs = getattr(callback, "tensor_inputs", inputs)  # diffusers' own callbacks say what they need
        if unknown := set(inputs) - {"latents"}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected ['latents'], got {', '.join(sorted(unknown))} too"
            )
        self.pipe, self.callback, self.inputs = pipe, callback, inputs
        self.guidance = eps_fn if isinstance(eps_fn, Guidance) else None
        self.state: Tensor | None = None  # the last one, as the callback left it
        pipe._interrupt = False

    def __call__(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        if self.callback is None:
            return x
        changed = self.callback(self.pipe, i, t, {name: x for name in self.inputs}) or {}
        self.state = changed.get("latents", x)
        if self.guidance is not None:
            self.guidance.scale.fill_(max(self.pipe.guidance_scale - 1, 0.0))  # the callback may have set it
        if self.pipe.interrupt:
            raise _Interrupted
        return self.state

    def until_interrupted(self, solve: Callable[[], Tensor]) -> Tensor:
        """Return solve(), or the state in which it was interrupted."""
        try:
            return solve()
        except _Interrupted:
            assert self.state is not None
            return self.state


def is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(isinstance(v, str) for v in value))


def of_each(null: Any) -> bool:
    """Return whether a null condition has one entry per sample: text features (B, T, C)."""
    return isinstance(null, Tensor) and null.dim() == 3


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return an integer from Python's, NumPy's or torch's kind."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def new_keys(generator: torch.Generator | list[torch.Generator] | None, batch: int) -> Tensor:
    """Return (batch,) int64 keys of the samples' own noise: all from one generator, or one from each."""

    def draw(g: torch.Generator | None, count: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (count,), generator=g, device=g.device if g else "cpu")

    return torch.cat([draw(g, 1) for g in generator]) if isinstance(generator, list) else draw(generator, batch)
