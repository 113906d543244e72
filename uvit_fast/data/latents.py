"""Latents of a frozen autoencoder, and text features, from the packed shards that `uvit-fast extract` writes.

The arrays of a folder (see shards.py):
- `moments` (2C, h, w): the posterior's mean and log variance. Items 2i and 2i + 1 are image i and its mirror image; item i is image i
  where mirror images were not extracted (text).
- `labels` (), int64, where images have classes.
- `text` (T, C): the features of every caption. `captions` (), int64, one more than there are items: item i has the captions
  captions[i] to captions[i + 1] - 1. `null_text` (T, C), one item: the features of "".

Opening reads what has changed since its checksum was last found right; see `shards.unchecked_faults`.
"""

import warnings

import numpy as np
import torch

from uvit_fast.data.datasets import Batch, Dataset, require_folder
from uvit_fast.data.shards import Packed, read_manifest, unchecked_faults
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError


class Latents(Dataset):
    """Posteriors; `finish` draws from them afresh: z = scale_factor * (mean + std * eps).

    Args:
        path: the folder.
        scale_factor: 0.18215 for Stable Diffusion's autoencoder on ImageNet, 0.23010 on COCO.
        skip_damaged: where a shard of `moments` or text is missing, truncated or has a wrong checksum, warn with its name and the number of
            its items, and let others, drawn once, take their place.

    Raises:
        UserError: a damaged shard that may not be skipped, or arrays that do not belong together.
    """

    synthetic = False

    def __init__(self, path: str | None, scale_factor: float, skip_damaged: bool = False):
        self.folder = require_folder(path, "latents that `uvit-fast extract` writes")
        self.manifest = read_manifest(self.folder)
        self.faults = unchecked_faults(self.folder, self.manifest)  # by file
        self.skip_damaged = skip_damaged
        self.scale_factor = scale_factor
        extracted_for = self.manifest.get("scale_factor", scale_factor)
        if extracted_for != scale_factor:
            warnings.warn(
                f"{self.folder}: extracted for scale_factor {extracted_for}; latent.scale_factor {scale_factor} is used",
                stacklevel=2,
            )
        self.posterior = self._array("moments", dims=3)
        if not len(self) or self.posterior.shape[0] % 2:
            raise UserError(
                f"{self.folder}: expected posteriors, mean and logvar, got {len(self)} items of {self.posterior.shape}"
            )
        has_labels = "labels" in self.manifest["arrays"]
        self.labels = self._array("labels", dims=0, length=len(self)).all() if has_labels else None
        self.shape = (self.posterior.shape[0] // 2, *self.posterior.shape[1:])
        self.classes = tuple(self.manifest.get("classes") or ()) if has_labels else ()
        self.encoders = {role: self.manifest.get(role) for role in ("vae", "text_encoder")}
        found = 0 if self.labels is None else int(self.labels.max()) + 1
        if self.classes and found > len(self.classes):
            raise UserError(f"{self.folder}: expected labels of {len(self.classes)} classes, got {found}")
        self.num_classes = len(self.classes) or found
        if self.faults and not skip_damaged:
            raise UserError(f"{self._damage()}; data.unreadable=skip would leave these out")
        self._place: np.ndarray | None = None
        self._leave_out(self.posterior.lost)

    def __len__(self) -> int:
        return len(self.posterior)

    def raw(self, items: list[tuple[int, int]]) -> Batch:
        index = [i for i, _ in self._placed(items)]
        raw = {"posterior": torch.from_numpy(self.posterior.take(index))}
        if self.labels is not None:
            raw["y"] = torch.from_numpy(self.labels[index])
        return raw

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        mean, logvar = raw.pop("posterior").float().chunk(2, dim=1)  # (B, C, h, w) each
        std = (0.5 * logvar.clamp(-30, 20)).exp()
        eps = draws.randn(*mean.shape)
        return {**raw, "x": self.scale_factor * (mean + std * eps)}

    def _leave_out(self, lost: np.ndarray) -> None:
        """Give the place of each item in `lost` (items,), bool, to another one."""
        if not lost.any():
            return
        if lost.all():
            raise UserError(f"{self._damage()}; nothing is left")
        self._place = np.arange(len(self))
        self._place[lost] = np.random.default_rng(0).choice(np.flatnonzero(~lost), lost.sum())
        warnings.warn(
            f"{self._damage()}; {lost.sum()} of {len(self)} items are left out, others take their place", stacklevel=3
        )

    def _placed(self, items: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return items if self._place is None else [(int(self._place[i]), epoch) for i, epoch in items]

    def _damage(self) -> str:
        first = next(iter(self.faults.values()))
        return first + (f", and {len(self.faults) - 1} more" if len(self.faults) > 1 else "")

    def _array(self, name: str, dims: int, length: int | None = None) -> Packed:
        skipped = (
            self.faults if self.skip_damaged and name in ("moments", "text") else ()
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
    """Latents with the CLIP features of their captions; one caption of an image is drawn for every epoch."""

    def __init__(self, path: str | None, scale_factor: float, skip_damaged: bool = False):
        super().__init__(path, scale_factor, skip_damaged)
        self.labels, self.num_classes, self.classes = None, 0, ()
        self.text = self._array("text", dims=2)
        self.captions = self._array("captions", dims=0, length=len(self) + 1).all()
        self.null_context = torch.from_numpy(self._array("null_text", dims=2, length=1).all()[0]).float()
        self.text_shape = self.text.shape
        if self.captions[0] != 0 or self.captions[-1] != len(self.text) or (np.diff(self.captions) < 1).any():
            raise UserError(f"{self.folder}: captions: expected every image to have some among {len(self.text)}")
        before = np.concatenate([[0], np.cumsum(self.text.lost)])[self.captions]  # lost features before each image's
        self._leave_out(self.posterior.lost | (before[1:] > before[:-1]))

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
