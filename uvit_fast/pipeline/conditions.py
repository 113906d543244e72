"""From labels and prompts to the network's condition."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from .calls import whole

logger = logging.get_logger(__name__)


def condition_of(
    pipe: Any, class_labels: Any, texts: dict[str, Any], guided: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the network's condition and, where `guided`, its null condition, by argument name; both are empty for an
    unconditional model.

    Args:
        pipe: the `UViTPipeline`. texts: prompt, prompt_embeds, negative_prompt, negative_prompt_embeds.

    Raises:
        ValueError: a condition that the model does not take, or lacks; a label or features out of range.
    """
    net, device = pipe.model, pipe._execution_device
    wants = "prompt" if net.context_dim else "class_labels" if net.num_classes else None
    asked = texts["prompt"] is not None or texts["prompt_embeds"] is not None
    for name, value in (("class_labels", class_labels is not None), ("prompt", asked)):
        if value != (name == wants):
            kind = {"prompt": "text", "class_labels": "classes", None: "no condition"}[wants]
            raise ValueError(f"{name}: the model takes {kind}; {'got' if value else 'expected'} {name}")
    if wants == "prompt":
        return _text_condition(pipe, **texts, guided=guided)
    for name, value in texts.items():
        if value is not None:
            raise ValueError(f"{name}: the model takes no text; expected none")
    if wants == "class_labels":
        several = isinstance(class_labels, Sequence | Tensor | np.ndarray) and np.ndim(class_labels)
        classes = net.num_classes - (pipe.config.null_label is not None)
        classes = min(classes, len(pipe.class_names) or classes)  # those that the model saw
        each = class_labels if several else [class_labels]
        labels = [pipe.get_label_ids(v)[0] if isinstance(v, str) else whole("class_labels", v, least=0) for v in each]
        if not labels or not all(label < classes for label in labels):
            raise ValueError(f"class_labels: expected labels from 0 to {classes - 1}, got {labels}")
        return {"y": torch.tensor(labels, device=device)}, {"y": pipe.config.null_label}
    return {}, {}


def _text_condition(
    pipe, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, guided: bool
) -> tuple[dict, dict]:
    """Return the features of the prompts (B, T, C), and of the negative ones, (T, C) or (B, T, C)."""
    for name, text, features in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if text is not None and features is not None:
            raise ValueError(f"{name}: expected it or {name}_embeds, got both")
    context = _features(pipe, "prompt", prompt, prompt_embeds)
    if not guided:
        if negative_prompt is not None or negative_prompt_embeds is not None:
            logger.warning("negative_prompt is not used: the guidance scale is 1")
        return {"context": context}, {"context": None}
    if negative_prompt is None and negative_prompt_embeds is None:
        negative_prompt = ""
    null = _features(pipe, "negative_prompt", negative_prompt, negative_prompt_embeds)
    if len(null) not in (1, len(context)):
        raise ValueError(f"negative_prompt: expected one, or one per prompt, {len(context)}, got {len(null)}")
    return {"context": context}, {"context": null if len(null) > 1 else null[0]}


def _features(pipe: Any, name: str, text: list[str] | str | None, features: Tensor | None) -> Tensor:
    """Return (B, T, C): encoded from text, or as given."""
    net = pipe.model
    if features is not None:
        if features.dim() != 3 or features.shape[1:] != (net.context_tokens, net.context_dim) or not len(features):
            expected = f"(B, {net.context_tokens}, {net.context_dim})"
            raise ValueError(f"{name}_embeds: expected {expected}, got {tuple(features.shape)}")
        return features.to(pipe._execution_device)
    texts = list(text) if isinstance(text, list | tuple) else [text]
    if not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"{name}: expected at least one, as text, got {texts or 'none'}")
    if pipe.tokenizer is None or pipe.text_encoder is None:
        raise ValueError(f"{name}: the pipeline has no tokenizer and text_encoder; expected both, or {name}_embeds")
    return _encode(pipe, [str(each) for each in texts])


def _encode(pipe: Any, prompts: list[str]) -> Tensor:
    """Return CLIP's last hidden state (B, T, C), padded to the model's number of tokens, without a mask."""
    length = pipe.model.context_tokens
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    for prompt, uncut in zip(prompts, pipe.tokenizer(prompts, verbose=False).input_ids):
        if len(uncut) > length:
            logger.warning(
                f"a prompt of {len(uncut)} tokens is cut to the {length} that the model takes: {prompt[:80]!r}"
            )
    return pipe.text_encoder(tokens.input_ids.to(pipe._execution_device)).last_hidden_state
