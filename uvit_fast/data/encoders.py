"""The frozen networks that encode a model's data, with the identities that a manifest records; the text encoder as a
function.
"""

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit_fast.config import CLIP, Config
from uvit_fast.provenance import UNKNOWN, Provenance, describe_encoder
from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.text import cut, shown

Digests = dict[str, Callable[[], str]]


def text_identity(model: Any, name: str) -> dict[str, str]:
    """Return its name, and checksums of its weights."""
    return identity(name, _text_digests(model))


def check_text_encoder(model: Any, name: str, known: Provenance) -> None:
    """Refuse a text encoder whose features differ from those that a model learned from, even if their shape is right.

    Raises:
        UserError: it is not the one that made them.
    """
    check_identity("text_encoder", f"text encoder {name}", "--clip or latent.text_encoder", _text_digests(model), known)


def _text_digests(model: Any) -> Digests:
    """Return checksums of the weights, by names that all versions of transformers share; the oldest manifests have
    `sha256`.
    """
    state = model.state_dict()
    weights = {k.removeprefix("text_model."): v for k, v in state.items() if v.is_floating_point()}
    return {"sha256": partial(_weights_digest, state), **digests(weights, "weights_")}


def load_clip(name: str) -> tuple[Any, Any]:
    """Return CLIP's tokenizer and text transformer (frozen, fp32, on the CPU) from a local folder or a hub name.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        UserError: neither a local folder, or a pipeline's, nor available from the hub.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise missing("a text encoder", "transformers", "diffusers") from None
    parts = ("tokenizer", "text_encoder") if (Path(name) / "text_encoder").is_dir() else ("", "")

    def load(**where: Any) -> tuple[Any, Any]:
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=parts[0], **where)
        return tokenizer, CLIPTextModel.from_pretrained(name, subfolder=parts[1], **where)

    tokenizer, model = load_pretrained("text encoder", name, load)
    return tokenizer, model.eval().requires_grad_(False)


def load_pretrained(what: str, name: str, load: Callable[..., Any]) -> Any:
    """Return `load(local_files_only=...)` for a local folder or a hub name. Local copies are preferred, and a hub that
    does not answer is not asked again: its libraries would retry every file for a minute.

    Raises:
        UserError: neither here nor on the hub, or damaged.
    """
    try:
        try:
            return load(local_files_only=True)
        except (OSError, ValueError):
            if Path(name).is_dir() or Path(name).is_absolute():
                raise
            if not _hub_answers():
                raise OSError("the hub cannot be reached, and it was not fetched before") from None
            return load(local_files_only=False)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each library raises its own kinds for damaged and foreign files
        reason = cut(str(error).strip().split("\n")[0])
        if Path(name).is_absolute() and not Path(name).exists():
            raise UserError(f"{what} {cut(name)}: no such folder; expected one, or a name on the hub") from None
        where = "the folder cannot be loaded" if Path(name).is_dir() else "neither a local folder nor found on the hub"
        raise UserError(f"{what} {cut(name)}: {where} ({reason})") from None


def quiet_diffusers() -> None:
    """Silence what diffusers warns of without need: at every cast of a network, modules to keep in fp32 where it names
    none; and that it ignores a shift, or a mean and deviation, which `autoencoders.own_scaling` reads.
    """
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_something)
    logging.getLogger("diffusers.configuration_utils").addFilter(_ignores_something)


def _names_something(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()


def _ignores_something(record: logging.LogRecord) -> bool:
    ignored = re.match(r"The config attributes \{(.*)\} were passed to Autoencoder", record.getMessage())
    return not ignored or not {*re.findall(r"'(\w+)':", ignored[1])} <= {"shift_factor", "latents_mean", "latents_std"}


def _hub_answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # offline by a setting, no network, refused by a proxy
        return False
    return True


def load_text_encoder(
    name: str, device: torch.device | str, known: Provenance = UNKNOWN
) -> Callable[[list[str]], Tensor]:
    """Return CLIP's text transformer, from a local folder or a hub name: captions -> last hidden state (B, T, C) fp32.

    Args:
        known: what a model learned from, if the encoder must be the same.

    Raises:
        ImportError, UserError: as `load_clip` and `check_text_encoder`.
    """
    device = as_device(device)
    tokenizer, model = load_clip(name)
    check_text_encoder(model, name, known)
    return text_encoder(tokenizer, model.to(device))


def text_encoder(tokenizer: Any, model: Any) -> Callable[[list[str]], Tensor]:
    """Return CLIP's tokenizer and text transformer as one function; shorter captions are padded as the tokenizer does,
    longer ones cut, with a warning that shows what is left out.
    """
    length: int = model.config.max_position_embeddings
    said: set[str] = set()

    def warn_of_the_rest(caption: str) -> None:
        tokens = tokenizer(caption, verbose=False).input_ids
        if len(tokens) > length and caption not in said and len(said) < 5:
            said.add(caption)
            rest = tokenizer.decode(tokens[length - 1 : -1])
            warnings.warn(
                f"{shown(caption)}: {len(tokens)} tokens, of which the text encoder reads {length}; "
                f"left out: {shown(rest)}",
                stacklevel=3,
            )

    def encode(captions: list[str]) -> Tensor:
        for caption in captions:
            if len(caption.encode()) > length - 2:  # a token is at least one byte
                warn_of_the_rest(caption)
        tokens = tokenizer(captions, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        with torch.inference_mode():
            return model(input_ids=tokens.input_ids.to(model.device)).last_hidden_state.float()

    return encode


def text_encoder_name(cfg: Config, known: Provenance) -> str:
    """Return the config's text encoder, else the one that encoded the model's training data, else the published
    models'.
    """
    asked = cfg.latent.text_encoder if cfg.latent else None
    return asked or known.encoders.get("text_encoder", {}).get("name") or CLIP


def load_text(
    cfg: Config, name: str | None, device: torch.device | str, known: Provenance = UNKNOWN
) -> tuple[Callable[[list[str]], Tensor], Tensor]:
    """Return the text encoder of a text-conditional model: captions -> features (B, T, C) fp32, and those of "", (T,
    C).

    Args:
        name: CLIP, a local folder or a hub name; None: see `text_encoder_name`.
        known: what the model learned from; the text encoder must be the same.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        UserError: the encoder is not available, its features do not fit the model, or it is not the one that the model
            learned from.
    """
    name = name or text_encoder_name(cfg, known)
    encode = load_text_encoder(name, device, known)
    null, expected = encode([""])[0], (cfg.model.context_tokens, cfg.model.context_dim)
    if null.shape != expected:
        raise UserError(f"text encoder {name}: {cfg.name} expected features {expected}, got {tuple(null.shape)}")
    return encode, null


def identity(name: str, checksums: Digests) -> dict[str, str]:
    """Return a network's name and checksums, as a manifest records them."""
    return {"name": _lasting(name), **{key: digest() for key, digest in checksums.items()}}


def check_identity(role: str, name: str, key: str, checksums: Digests, known: Provenance) -> None:
    """Refuse a network other than the one that encoded a model's training data.

    Args:
        role: in `Provenance.encoders`. name, key: what the message calls it, and where users name it.

    Raises:
        UserError: the checksums that both have disagree.
    """
    maker = known.encoders.get(role, {})
    common = [each for each in checksums if each in maker]
    if common and not any(checksums[each]() == maker[each] for each in common):
        made = "latents" if role == "vae" else "text features"
        raise UserError(
            f"{name}: not the one that made the {made} which the model learned from, {describe_encoder(maker)}; "
            "expected "
            f"{key} to name that one" + (", or one with its encoder" if role == "vae" else "")
        )


def digests(weights: dict[str, Tensor], prefix: str) -> Digests:
    """Return checksums of the weights as they are and as stored in half precision, each computed on demand."""
    kinds = {"": torch.float32, "float16_": torch.float16, "bfloat16_": torch.bfloat16}
    return {f"{prefix}{kind}sha256": partial(_weights_digest, weights, dtype) for kind, dtype in kinds.items()}


def _weights_digest(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lasting(name: str) -> str:
    """Return a hub name, or a local folder's path in a form that holds from any working directory."""
    return os.path.abspath(name) if os.path.isdir(name) else name
