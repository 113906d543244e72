"""The frozen autoencoders of latent models, diffusers' AutoencoderKL and AutoencoderDC, as functions.

KL's encoder returns a posterior, mean and log variance; DC's ("Deep Compression Autoencoder for Efficient
High-Resolution Diffusion Models", arXiv:2410.10733) returns the latents themselves. Both decode latents; a network sees
them scaled: see `Scaling`.
"""

import sys
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
from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.importing import absent, uncollected
from uvit_fast.runtime.text import cut, shown

Pixels = Tensor  # (B, 3, H, W) uint8
KINDS = ("AutoencoderKL", "AutoencoderDC")
# what diffusers imports with its autoencoders where it is installed, and they do without
NEEDLESS = {"transformers", "peft", "scipy", "torchvision", "torchao", "bitsandbytes", "gguf", "optimum", "modelopt"}
NEEDLESS |= {"flash_attn", "flash_attn_interface", "sageattention", "flashinfer", "xformers"}  # attention of others
NEEDLESS |= {"torch._dynamo"}  # PyTorch's compiler


@dataclass(frozen=True)
class Scaling:
    """The map from latents to a network's input: z = (latents - shift) * scale.

    Attributes:
        scale, shift: one number, or one per channel.
    """

    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0

    def applied(self, latents: Tensor) -> Tensor:
        """Scale latents: (B, C, h, w) fp32 -> (B, C, h, w) fp32."""
        scale, shift = _on(self, latents.device)
        return (latents - shift) * scale

    def undone(self, z: Tensor) -> Tensor:
        """Invert `applied`: (B, C, h, w) -> (B, C, h, w) fp32."""
        scale, shift = _on(self, z.device)
        return z.float() / scale + shift

    def as_json(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in (("scale_factor", self.scale), ("shift_factor", self.shift))
        }


@lru_cache
def _on(scaling: Scaling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (1 or C, 1, 1) fp32, uploaded once: no step waits for them, and a captured loop can use
    them.
    """
    with torch.inference_mode(False):
        scale, shift = (torch.tensor(value).view(-1, 1, 1).to(device) for value in (scaling.scale, scaling.shift))
    return scale, shift


def own_scaling(vae: Any) -> Scaling:
    """Return the scaling in an autoencoder's config; from its channels' mean and deviation, if it has them, as
    diffusers does.
    """
    config = vae.config
    factor, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean and std:
        return Scaling(tuple(factor / s for s in std), tuple(mean))
    return Scaling(factor, shift)


def scaling_of(cfg: Config, known: Provenance = UNKNOWN, vae: Any = None) -> Scaling:
    """Return the scaling of the model of `cfg`: the config's, else that of the data which the model learned from, else
    the autoencoder's own.

    Args:
        vae: the autoencoder, if at hand.

    Raises:
        UserError: none of them gives it.
    """
    asked, learned = cfg.latent, known.scaling
    assert asked is not None
    own = own_scaling(vae).as_json() if vae is not None and asked.scale_factor != "measured" else {}
    if known.encoders.get("vae") and not learned:  # data from before a shift was recorded and applied
        own["shift_factor"] = 0.0
    values = {}
    for name in ("scale_factor", "shift_factor"):
        value = getattr(asked, name)
        value = None if value == "measured" else value
        values[name] = next((v for v in (value, learned.get(name), own.get(name)) if v is not None), None)
    if values["scale_factor"] is None:
        raise UserError(
            "latent.scale_factor: expected a number, or one per channel, since nothing beside the weights of "
            f"{cfg.name} says it"
        )
    return Scaling(*(tuple(v) if isinstance(v, list | tuple) else v or 0.0 for v in values.values()))


def measured(mean: Sequence[float], std: Sequence[float], where: str) -> Scaling:
    """Return the scaling that gives each channel mean 0 and standard deviation 1.

    Raises:
        UserError: a channel is constant; `where` is the message's name for the latents.
    """
    if flat := [i for i, s in enumerate(std) if not s > 0]:
        raise UserError(
            f"{where}: latent.scale_factor measured: channel {flat[0]} is the same everywhere; expected numbers instead"
        )
    return Scaling(tuple(1 / s for s in std), tuple(mean))


def is_deterministic(vae: Any) -> bool:
    """Return whether its encoder returns latents rather than a posterior."""
    return type(vae).__name__ == "AutoencoderDC"


def compression(vae: Any) -> int:
    """Return the side of a latent pixel in pixels."""
    return 2 ** (len(vae.config["encoder_block_out_channels" if is_deterministic(vae) else "block_out_channels"]) - 1)


def encoder(vae: Any) -> Callable[[Pixels], Tensor]:
    """Return a function from pixels (B, 3, H, W) uint8 to posteriors (B, 2C, h, w) fp32, mean and log variance, or, for
    a deterministic encoder, to latents (B, C, h, w) fp32.
    """

    @torch.inference_mode()
    def encode(pixels: Pixels) -> Tensor:
        x = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        encoded = vae.encode(x)
        return (encoded.latent if is_deterministic(vae) else encoded.latent_dist.parameters).float()

    return encode


def decoder(vae: Any, scaling: Scaling, chunk: int = 25) -> Callable[[Tensor], Tensor]:
    """Return a function from the network's samples (B, C, h, w) to pixels (B, 3, H, W) fp32 in about [-1, 1].

    Args:
        vae: diffusers' `AutoencoderKL` or `AutoencoderDC`.
        chunk: latents decoded at a time, whatever the batch: activations at the images' size dominate the memory.
    """

    def decode(z: Tensor) -> Tensor:
        parts = scaling.undone(z).to(vae.dtype).split(chunk)
        return torch.cat([vae.decode(part).sample.float() for part in parts])

    return decode


def load_decoder(
    cfg: Config, device: torch.device | str, known: Provenance = UNKNOWN, alone: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the decoder of `cfg.latent`'s frozen autoencoder, as from `decoder`: bf16 on a GPU, fp32 on a CPU.

    Args:
        known: what the model learned from; the autoencoder must decode those latents.
        alone: whether this process uses nothing else of diffusers: see `import_alone`.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        UserError: the autoencoder is neither a local folder nor available from the hub, or it is for other latents.
    """
    assert cfg.latent is not None
    device = as_device(device)
    if alone:
        import_alone()
    vae = load_autoencoder(cfg.latent.autoencoder, known, cfg.model.in_chans)
    vae = vae.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return decoder(vae, scaling_of(cfg, known, vae))


def import_alone() -> None:
    """Import diffusers' autoencoders without the packages that it would import with them, which take most of the time.
    From then on, diffusers takes these packages for missing, and its modules cannot be compiled.

    Where it is missing, or cannot go without them, nothing is imported.
    """
    if "diffusers" in sys.modules:
        return
    compiler = torch.compiler.disable  # it imports torch._dynamo, for decorators of what nobody will compile
    try:
        torch.compiler.disable = lambda function=None, *_, **__: function or (lambda decorated: decorated)
        with uncollected(), absent(NEEDLESS):
            import diffusers

            _ = [getattr(diffusers, kind) for kind in KINDS]
    except Exception:  # of an import of it as a whole, the caller's error
        for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
            del sys.modules[name]
    finally:
        torch.compiler.disable = compiler


def load_autoencoder(name: str, known: Provenance = UNKNOWN, channels: int | None = None) -> Any:
    """Return diffusers' autoencoder of the kind that its config says; fp32, frozen, on the CPU.

    Args:
        name: a local folder, or owner/repository[/subfolder] on the hub; of a pipeline, its `vae`.
        known: what a model learned from, if the autoencoder must be for its latents.
        channels: of the latents, if a model requires them.

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
    """Return its name, and checksums of the weights that make the latents: fine-tuned decoders share the encoder's."""
    return identity(name, _vae_digests(vae))


def check_vae(vae: Any, name: str, known: Provenance) -> None:
    """Refuse an autoencoder for other latents than those that a model learned from.

    Raises:
        UserError: its encoder did not make them.
    """
    check_identity("vae", f"autoencoder {name}", "latent.autoencoder", _vae_digests(vae), known)


def _vae_digests(vae: Any) -> Digests:
    weights = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    return digests(weights, "encoder_")
