"""The frozen autoencoders of latent models, diffusers' AutoencoderKL and AutoencoderDC, as functions.

KL's encoder gives a posterior, mean and log variance; DC's ("Deep Compression Autoencoder for Efficient High-Resolution
Diffusion Models", arXiv:2410.10733) gives the latents themselves. Either decodes latents, and a network sees those
scaled: see `Scaling`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.data.encoders import Digests, check_identity, digests, identity, load_pretrained, quiet_diffusers
from uvit_fast.provenance import UNKNOWN, Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.text import cut, shown

Pixels = Tensor  # (B, 3, H, W) uint8
KINDS = ("AutoencoderKL", "AutoencoderDC")


@dataclass(frozen=True)
class Scaling:
    """What a network sees of latents: z = (latents - shift) * scale.

    Attributes:
        scale, shift: one number, or one a channel.
    """

    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0

    def applied(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) fp32 -> (B, C, h, w) fp32."""
        scale, shift = _on(self, latents.device)
        return (latents - shift) * scale

    def undone(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w) fp32."""
        scale, shift = _on(self, z.device)
        return z.float() / scale + shift

    def as_json(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in (("scale_factor", self.scale), ("shift_factor", self.shift))
        }


@lru_cache
def _on(scaling: Scaling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, (1 or C, 1, 1) fp32, uploaded once: no step waits for it, and a captured loop finds it there."""
    with torch.inference_mode(False):
        scale, shift = (torch.tensor(value).view(-1, 1, 1).to(device) for value in (scaling.scale, scaling.shift))
    return scale, shift


def own_scaling(vae: Any) -> Scaling:
    """What an autoencoder's config says; where it has the channels' mean and deviation, as diffusers applies them."""
    config = vae.config
    factor, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean and std:
        return Scaling(tuple(factor / s for s in std), tuple(mean))
    return Scaling(factor, shift)


def scaling_of(cfg: Config, known: Provenance = UNKNOWN, vae: Any = None) -> Scaling:
    """What the model of `cfg` sees: what the config says, else what the model learned from, else what the autoencoder's
    own config says.

    Args:
        vae: the autoencoder, where it is at hand.

    Raises:
        UserError: none of them says it.
    """
    asked, learned = cfg.latent, known.scaling
    assert asked is not None
    own = own_scaling(vae).as_json() if vae is not None and asked.scale_factor != "measured" else {}
    if known.encoders.get("vae") and not learned:  # of before a shift was kept, and applied
        own["shift_factor"] = 0.0
    values = {}
    for name in ("scale_factor", "shift_factor"):
        value = getattr(asked, name)
        value = None if value == "measured" else value
        values[name] = next((v for v in (value, learned.get(name), own.get(name)) if v is not None), None)
    if values["scale_factor"] is None:
        raise UserError(
            "latent.scale_factor: expected a number, or one a channel, since nothing beside the weights of "
            f"{cfg.name} says it"
        )
    return Scaling(*(tuple(v) if isinstance(v, list | tuple) else v or 0.0 for v in values.values()))


def measured(mean: Sequence[float], std: Sequence[float], where: str) -> Scaling:
    """The scaling that gives each channel a mean of 0 and a deviation of 1.

    Raises:
        UserError: a channel that does not vary; `where` is what the message calls the latents.
    """
    if flat := [i for i, s in enumerate(std) if not s > 0]:
        raise UserError(
            f"{where}: latent.scale_factor measured: channel {flat[0]} is the same everywhere; expected numbers instead"
        )
    return Scaling(tuple(1 / s for s in std), tuple(mean))


def is_deterministic(vae: Any) -> bool:
    """Whether its encoder gives latents, and no posterior."""
    return type(vae).__name__ == "AutoencoderDC"


def compression(vae: Any) -> int:
    """Pixels a latent pixel, of a side."""
    return 2 ** (len(vae.config["encoder_block_out_channels" if is_deterministic(vae) else "block_out_channels"]) - 1)


def encoder(vae: Any) -> Callable[[Pixels], Tensor]:
    """A function from pixels (B, 3, H, W) uint8 to posteriors (B, 2C, h, w) fp32, mean and log variance; of a
    deterministic encoder to latents (B, C, h, w) fp32.
    """

    @torch.inference_mode()
    def encode(pixels: Pixels) -> Tensor:
        x = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        encoded = vae.encode(x)
        return (encoded.latent if is_deterministic(vae) else encoded.latent_dist.parameters).float()

    return encode


def decoder(vae: Any, scaling: Scaling, chunk: int = 25) -> Callable[[Tensor], Tensor]:
    """A function from what the network makes (B, C, h, w) to pixels (B, 3, H, W) fp32 in about [-1, 1].

    Args:
        vae: diffusers' `AutoencoderKL` or `AutoencoderDC`.
        chunk: latents at a time, whatever the batch: activations at the images' size are what takes the memory.
    """

    def decode(z: Tensor) -> Tensor:
        parts = scaling.undone(z).to(vae.dtype).split(chunk)
        return torch.cat([vae.decode(part).sample.float() for part in parts])

    return decode


def load_decoder(cfg: Config, device: torch.device, known: Provenance = UNKNOWN) -> Callable[[Tensor], Tensor]:
    """The frozen autoencoder of `cfg.latent`, as `decoder` makes it: bf16 on a GPU, fp32 on a CPU.

    Args:
        known: what the model learned from, whose latents it must be able to decode.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        UserError: the autoencoder is neither a local folder nor to be had from the hub, or it is one of other latents.
    """
    assert cfg.latent is not None
    vae = load_autoencoder(cfg.latent.autoencoder, known, cfg.model.in_chans)
    vae = vae.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return decoder(vae, scaling_of(cfg, known, vae))


def load_autoencoder(name: str, known: Provenance = UNKNOWN, channels: int | None = None) -> Any:
    """diffusers' autoencoder of the kind that its config says; fp32, frozen, on the CPU.

    Args:
        name: a local folder, or owner/repository[/subfolder] on the hub; of a pipeline its `vae`.
        known: what a model learned from, where it shall be an autoencoder of its latents.
        channels: of the latents, where a model takes so many.

    Raises:
        ImportError, UserError: as `load_decoder`; an autoencoder of another kind.
    """
    try:
        import diffusers
    except ImportError:
        raise missing("an autoencoder of latents", "diffusers", "diffusers") from None
    quiet_diffusers()
    where, parts = {"pretrained_model_name_or_path": name}, name.split("/")
    if (Path(name) / "vae").is_dir():  # of a pipeline
        where["subfolder"] = "vae"
    elif not Path(name).is_dir() and len(parts) > 2:
        where = {"pretrained_model_name_or_path": "/".join(parts[:2]), "subfolder": "/".join(parts[2:])}
    config = load_pretrained("autoencoder", name, partial(diffusers.AutoencoderKL.load_config, **where))
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise UserError(f"autoencoder {cut(name)}: expected {' or '.join(KINDS)}, got {shown(kind)}")
    vae = load_pretrained("autoencoder", name, partial(getattr(diffusers, kind).from_pretrained, **where))
    check_vae(vae, name, known)
    if channels not in (None, vae.config.latent_channels):
        raise UserError(
            f"autoencoder {cut(name)}: makes latents of {vae.config.latent_channels} channels; expected {channels}, as "
            "model.in_chans says"
        )
    return vae.eval().requires_grad_(False)


def vae_identity(vae: Any, name: str) -> dict[str, str]:
    """Its name, and checksums of the weights that make the latents: fine-tuned decoders share the encoder's."""
    return identity(name, _vae_digests(vae))


def check_vae(vae: Any, name: str, known: Provenance) -> None:
    """Refuse an autoencoder of other latents than those that a model learned from.

    Raises:
        UserError: its encoder is none that made them.
    """
    check_identity("vae", f"autoencoder {name}", "latent.autoencoder", _vae_digests(vae), known)


def _vae_digests(vae: Any) -> Digests:
    weights = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    return digests(weights, "encoder_")
