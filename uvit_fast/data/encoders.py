"""The frozen networks that make latents and text features, as functions, with identities that a manifest keeps."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from uvit_fast.config import UserError
from uvit_fast.data.extract import Pixels
from uvit_fast.extras import missing
from uvit_fast.provenance import UNKNOWN, Provenance, describe_encoder

Digests = dict[str, Callable[[], str]]


def vae_encoder(vae: Any) -> Callable[[Pixels], Tensor]:
    """diffusers' AutoencoderKL as a function from pixels (B, 3, H, W) uint8 to moments (B, 2C, h, w) fp32."""

    @torch.inference_mode()
    def encode(pixels: Pixels) -> Tensor:
        x = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        return vae.encode(x).latent_dist.parameters.float()

    return encode


def vae_identity(vae: Any, name: str) -> dict[str, str]:
    """Its name, and checksums of the weights that make the moments: fine-tuned decoders share the encoder's."""
    return {"name": _lasting(name), **{key: digest() for key, digest in _vae_digests(vae).items()}}


def check_vae(vae: Any, name: str, known: Provenance) -> None:
    """Refuse an autoencoder of other latents than those that a model learned from.

    Raises:
        UserError: its encoder is none that made them.
    """
    _check("vae", f"autoencoder {name}", "latent.decoder", _vae_digests(vae), known)


def _vae_digests(vae: Any) -> Digests:
    weights = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    return _digests(weights, "encoder_")


def text_identity(model: Any, name: str) -> dict[str, str]:
    """Its name, and checksums of its weights."""
    return {"name": _lasting(name), **{key: digest() for key, digest in _text_digests(model).items()}}


def check_text_encoder(model: Any, name: str, known: Provenance) -> None:
    """Refuse a text encoder of other features than those that a model learned from, though they have the right shape.

    Raises:
        UserError: it is not the one that made them.
    """
    _check("text_encoder", f"text encoder {name}", "--clip or latent.text_encoder", _text_digests(model), known)


def _text_digests(model: Any) -> Digests:
    """Of the weights by the names that all versions of transformers agree on, but for the oldest manifests' `sha256`."""
    state = model.state_dict()
    weights = {k.removeprefix("text_model."): v for k, v in state.items() if v.is_floating_point()}
    return {"sha256": partial(_weights_digest, state), **_digests(weights, "weights_")}


def load_clip(name: str) -> tuple[Any, Any]:
    """CLIP's tokenizer and text transformer (frozen, fp32, on the CPU) of a local folder or a hub name.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        UserError: neither a local folder nor to be had from the hub.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise missing("a text encoder", "transformers", "diffusers") from None
    try:
        return CLIPTokenizer.from_pretrained(name), CLIPTextModel.from_pretrained(name).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"text encoder {name}: neither a local folder nor found on the hub ({reason})") from None


def load_text_encoder(name: str, device: torch.device, known: Provenance = UNKNOWN) -> Callable[[list[str]], Tensor]:
    """CLIP's text transformer, a local folder or a hub name: captions -> last hidden state (B, T, C) fp32.

    Args:
        known: what a model learned from, where it shall be the same encoder.

    Raises:
        ImportError, UserError: as `load_clip` and `check_text_encoder`.
    """
    tokenizer, model = load_clip(name)
    check_text_encoder(model, name, known)
    return text_encoder(tokenizer, model.to(device))


def text_encoder(tokenizer: Any, model: Any) -> Callable[[list[str]], Tensor]:
    """CLIP's tokenizer and text transformer as a function; longer captions are cut, shorter ones padded, as the tokenizer does."""
    length = model.config.max_position_embeddings

    @torch.inference_mode()
    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        return model(input_ids=tokens.input_ids.to(model.device)).last_hidden_state.float()

    return encode


def _check(role: str, name: str, key: str, digests: Digests, known: Provenance) -> None:
    maker = known.encoders.get(role, {})
    common = [each for each in digests if each in maker]
    if common and not any(digests[each]() == maker[each] for each in common):
        made = "latents" if role == "vae" else "text features"
        raise UserError(
            f"{name}: not the one that made the {made} which the model learned from, {describe_encoder(maker)}; expected "
            f"{key} to name that one" + (", or one with its encoder" if role == "vae" else "")
        )


def _digests(weights: dict[str, Tensor], prefix: str) -> Digests:
    """Checksums of the weights as they are and as copies in half precision have them, each when it is asked for."""
    kinds = {"": torch.float32, "float16_": torch.float16, "bfloat16_": torch.bfloat16}
    return {f"{prefix}{kind}sha256": partial(_weights_digest, weights, dtype) for kind, dtype in kinds.items()}


def _weights_digest(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _lasting(name: str) -> str:
    """A name of the hub, or where a local folder lies, from wherever it is read."""
    return os.path.abspath(name) if os.path.isdir(name) else name
