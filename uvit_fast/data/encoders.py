"""The frozen networks that make latents and text features, as functions, with identities that a manifest keeps."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uvit_fast.config import UserError
from uvit_fast.data.extract import Pixels
from uvit_fast.extras import missing


def vae_encoder(vae: Any) -> Callable[[Pixels], Tensor]:
    """diffusers' AutoencoderKL as a function from pixels (B, 3, H, W) uint8 to moments (B, 2C, h, w) fp32."""

    @torch.inference_mode()
    def encode(pixels: Pixels) -> Tensor:
        x = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        return vae.encode(x).latent_dist.parameters.float()

    return encode


def vae_identity(vae: Any, name: str) -> dict[str, str]:
    """Its name, and the checksum of the weights that make the moments: fine-tuned decoders share the encoder's."""
    weights = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    return {"name": name, "encoder_sha256": _weights_digest(weights)}


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


def load_text_encoder(name: str, device: torch.device) -> tuple[Callable[[list[str]], Tensor], dict[str, str]]:
    """CLIP's text transformer, a local folder or a hub name: captions -> last hidden state (B, T, C) fp32; and its identity.

    Longer captions are cut to CLIP's length, shorter ones padded as its tokenizer does.

    Raises:
        ImportError, UserError: as `load_clip`.
    """
    tokenizer, model = load_clip(name)
    model = model.to(device)
    length = model.config.max_position_embeddings

    @torch.inference_mode()
    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        return model(input_ids=tokens.input_ids.to(device)).last_hidden_state.float()

    return encode, {"name": name, "sha256": _weights_digest(model.state_dict())}


def _weights_digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
