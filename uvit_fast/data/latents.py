"""Latents of a frozen autoencoder, and text features, from the packed shards that `uvit-fast extract` writes.

The arrays of a folder (see shards.py):

- `moments` (2C, h, w): the posterior's mean and log variance; or `latents` (C, h, w) of a deterministic encoder. Items
  2i and 2i + 1 are image i and its mirror image; item i is image i where mirror images were not extracted (text).
- `labels` (), int64, where images have classes.
- `text` (T, C): the features of every caption. `captions` (), int64, one more than there are items: item i has captions
  captions[i] to captions[i + 1] - 1. `null_text` (T, C), one item: the features of "".

Opening a folder reads the files that changed since they were last verified; see `shards.unchecked_faults`.
"""

import copy
import warnings
from typing import Any

import numpy as np
import torch

from uvit_fast.config import Factor
from uvit_fast.data.autoencoders import Scaling, measured
from uvit_fast.data.datasets import Batch, Indexed, require_folder
from uvit_fast.data.shards import Packed, read_manifest, unchecked_faults
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError


class Latents(Indexed):
    """Posteriors, from which `finish` draws anew, mean + std * eps, or a deterministic encoder's latents; scaled.

    Args:
        path: the folder.
        scale_factor, shift_factor: as in a config's `latent`: z = scale * (latents - shift). None: the manifest's.
        skip_damaged: if a shard of latents or text is missing, truncated or has a wrong checksum, warn with its name
            and its number of items, and replace those by others, drawn once.

    Raises:
        UserError: a damaged shard that may not be skipped, arrays that do not belong together, or no scale given
            anywhere.
    """

    scaling: Scaling
    _place: np.ndarray | None = None  # the stored index of each item; None: its own

    def __init__(
        self,
        path: str | None,
        scale_factor: Factor | str | None = None,
        shift_factor: Factor | None = None,
        skip_damaged: bool = False,
    ):
        self.folder = require_folder(path, "latents that `uvit-fast extract` writes")
        self.manifest = read_manifest(self.folder)
        self.faults = unchecked_faults(self.folder, self.manifest)  # by file
        self.skip_damaged = skip_damaged
        self.is_posterior = "latents" not in self.manifest["arrays"]
        self.stored = self._array("moments" if self.is_posterior else "latents", dims=3)
        channels = self.stored.shape[0] // (1 + self.is_posterior)
        if not len(self) or channels * (1 + self.is_posterior) != self.stored.shape[0]:
            wanted = "posteriors, mean and logvar" if self.is_posterior else "latents"
            raise UserError(f"{self.folder}: expected {wanted}, got {len(self)} items of {self.stored.shape}")
        self.scaling = self._scaling(scale_factor, shift_factor)
        has_labels = "labels" in self.manifest["arrays"]
        self.labels = self._array("labels", dims=0, length=len(self)).all() if has_labels else None
        self.shape = (channels, *self.stored.shape[1:])
        self.classes = tuple(self.manifest.get("classes") or ()) if has_labels else ()
        self.encoders = {role: self.manifest.get(role) for role in ("vae", "text_encoder")}
        found = 0 if self.labels is None else int(self.labels.max()) + 1
        if self.classes and found > len(self.classes):
            raise UserError(f"{self.folder}: expected labels of {len(self.classes)} classes, got {found}")
        self.num_classes = len(self.classes) or found
        if self.faults and not skip_damaged:
            raise UserError(f"{self._damage()}; data.unreadable=skip would leave these out")
        self.lost = self.stored.lost  # (items,) bool
        self._leave_out(self.lost)

    def __len__(self) -> int:
        return len(self.stored) if self._place is None else len(self._place)

    @property
    def views(self) -> int:
        return 1 + bool(self.manifest.get("mirror_images", "captions" not in self.manifest["arrays"]))

    def part(self, items: np.ndarray) -> "Latents":
        part = copy.copy(self)
        part._place = self._instead(items)
        return part

    def raw(self, items: list[tuple[int, int]]) -> Batch:
        index = [i for i, _ in self._placed(items)]
        raw = {"stored": torch.from_numpy(self.stored.take(index))}
        if self.labels is not None:
            raw["y"] = torch.from_numpy(self.labels[index])
        return raw

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        latents = raw.pop("stored").float()
        if self.is_posterior:
            mean, logvar = latents.chunk(2, dim=1)  # (B, C, h, w) each
            std = (0.5 * logvar.clamp(-30, 20)).exp()
            latents = mean + std * draws.randn(*mean.shape)
        return {**raw, "x": self.scaling.applied(latents)}

    def _scaling(self, scale: Factor | str | None, shift: Factor | None) -> Scaling:
        """Return the requested scaling, else the manifest's."""
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in self.manifest.items()}
        if scale == "measured":
            if "channel_mean" not in known:
                raise UserError(f"{self.folder}: latent.scale_factor measured: no channel was measured; extract again")
            return measured(known["channel_mean"], known["channel_std"], str(self.folder))
        told = {"scale_factor": known.get("scale_factor"), "shift_factor": known.get("shift_factor", 0.0)}
        asked: dict[str, Any] = {"scale_factor": scale, "shift_factor": shift}
        for name, value in asked.items():
            if None not in (value, told[name]) and value != told[name]:
                before, now = ("one per channel" if isinstance(v, tuple) else v for v in (told[name], value))
                warnings.warn(
                    f"{self.folder}: extracted for {name} {before}; latent.{name} {now} is used", stacklevel=4
                )
        used = {name: told[name] if value is None else value for name, value in asked.items()}
        if used["scale_factor"] is None:
            raise UserError(f"latent.scale_factor: expected a number, since {self.folder} says none")
        return Scaling(used["scale_factor"], used["shift_factor"])

    def _leave_out(self, lost: np.ndarray) -> None:
        """Let another item replace each item in `lost` (items,), bool."""
        self.lost = lost
        if not lost.any():
            return
        self._place = self._instead(np.arange(len(self)))
        warnings.warn(
            f"{self._damage()}; {lost.sum()} of {len(self)} items are left out, others take their place", stacklevel=3
        )

    def _instead(self, items: np.ndarray) -> np.ndarray:
        """Return these items (n,), with those that are lost replaced by others of them."""
        lost, places = self.lost[items], items.copy()
        if lost.all():
            raise UserError(f"{self._damage()}; nothing is left")
        places[lost] = np.random.default_rng(0).choice(items[~lost], lost.sum())
        return places

    def _placed(self, items: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return items if self._place is None else [(int(self._place[i]), epoch) for i, epoch in items]

    def _damage(self) -> str:
        first = next(iter(self.faults.values()))
        return first + (f", and {len(self.faults) - 1} more" if len(self.faults) > 1 else "")

    def _array(self, name: str, dims: int, length: int | None = None) -> Packed:
        skipped = (
            self.faults if self.skip_damaged and name in ("moments", "latents", "text") else ()
        )  # the others are small, and needed whole
        array = Packed(self.folder, self.manifest, name, frozenset(skipped))
        needed = [shard["file"] for shard in self.manifest["arrays"][name]["shards"]]
        if self.skip_damaged and not skipped and any(file in self.faults for file in needed):
            raise UserError(f"{next(self.faults[file] for file in needed if file in self.faults)}; extract again")
        if len(array.shape) != dims or length not in (None, len(array)):
            wanted = f"{dims} dimensions an item" + (f" and {length} items" if length is not None else "")
            raise UserError(f"{self.folder}: expected {name} of {wanted}, got {len(array)} items of {array.shape}")
        return array


class TextLatents(Latents):
    """Latents with the CLIP features of their captions; for every epoch, one caption of each image is drawn."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.labels, self.num_classes, self.classes = None, 0, ()
        self.text = self._array("text", dims=2)
        self.captions = self._array("captions", dims=0, length=len(self) + 1).all()
        self.null_context = torch.from_numpy(self._array("null_text", dims=2, length=1).all()[0]).float()
        self.text_shape = self.text.shape
        if self.captions[0] != 0 or self.captions[-1] != len(self.text) or (np.diff(self.captions) < 1).any():
            raise UserError(f"{self.folder}: captions: expected every image to have some among {len(self.text)}")
        before = np.concatenate([[0], np.cumsum(self.text.lost)])[self.captions]  # lost features before each image's
        self._leave_out(self.stored.lost | (before[1:] > before[:-1]))

    def raw(self, items: list[tuple[int, int]]) -> Batch:
        items, picks = self._placed(items), []
        for index, epoch in items:
            first, last = int(self.captions[index]), int(self.captions[index + 1])
            picks.append(first + int(np.random.default_rng((epoch, index)).integers(last - first)))
        context = torch.from_numpy(self.text.take(picks))
        return {**super().raw(items), "context": context}

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        batch = super().finish(raw, draws)
        return {**batch, "context": batch["context"].float()}
