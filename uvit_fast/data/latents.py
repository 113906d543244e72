"""Latents of a frozen autoencoder, and text features, from the packed shards that `uvit-fast extract` writes.

The arrays of a folder (see shards.py):
- `moments` (2C, h, w): mean and log variance of the posterior. Items 2i and 2i + 1 are image i and its mirror image; item i is image i
  where mirror images were not extracted (text).
- `labels` (), int64, where images have classes.
- `text` (T, C): the features of every caption. `captions` (), int64, one more than there are items: item i has the captions
  captions[i] to captions[i + 1] - 1. `null_text` (T, C), one item: the features of "".

Opening reads headers only, and refuses truncated shards. Checksums take reading it all: `uvit-fast data check`.
"""

import warnings

import numpy as np
import torch

from uvit_fast.config import UserError
from uvit_fast.data.datasets import Batch, require_folder
from uvit_fast.data.shards import Packed, read_manifest


class Latents:
    """Posterior moments; `finish` samples the posterior afresh: z = scale_factor * (mean + std * eps).

    Args:
        path: the folder.
        scale_factor: 0.18215 for Stable Diffusion's autoencoder on ImageNet, 0.23010 on COCO.

    Raises:
        UserError: a shard that is missing or truncated, or arrays that do not belong together.
    """

    synthetic = False

    def __init__(self, path: str | None, scale_factor: float):
        self.folder = require_folder(path, "latents that `uvit-fast extract` writes")
        self.manifest = read_manifest(self.folder)
        self.scale_factor = scale_factor
        extracted_for = self.manifest.get("scale_factor", scale_factor)
        if extracted_for != scale_factor:
            warnings.warn(
                f"{self.folder}: extracted for scale_factor {extracted_for}; latent.scale_factor {scale_factor} is used",
                stacklevel=2,
            )
        self.moments = self._array("moments", dims=3)
        if not len(self) or self.moments.shape[0] % 2:
            raise UserError(
                f"{self.folder}: expected moments of mean and logvar, got {len(self)} items of {self.moments.shape}"
            )
        has_labels = "labels" in self.manifest["arrays"]
        self.labels = self._array("labels", dims=0, length=len(self)).all() if has_labels else None
        self.shape = (self.moments.shape[0] // 2, *self.moments.shape[1:])
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.moments)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        index = [i for i, _ in items]
        raw = {"moments": torch.from_numpy(self.moments.take(index))}
        if self.labels is not None:
            raw["y"] = torch.from_numpy(self.labels[index])
        return raw

    def finish(self, raw: Batch, generator: torch.Generator) -> Batch:
        mean, logvar = raw.pop("moments").float().chunk(2, dim=1)  # (B, C, h, w) each
        std = (0.5 * logvar.clamp(-30, 20)).exp()
        eps = torch.randn(mean.shape, device=mean.device, generator=generator)
        return {**raw, "x": self.scale_factor * (mean + std * eps)}

    def _array(self, name: str, dims: int, length: int | None = None) -> Packed:
        array = Packed(self.folder, self.manifest, name)
        if len(array.shape) != dims or length not in (None, len(array)):
            wanted = f"{dims} dimensions an item" + (f" and {length} items" if length is not None else "")
            raise UserError(f"{self.folder}: expected {name} of {wanted}, got {len(array)} items of {array.shape}")
        return array


class TextLatents(Latents):
    """Latents with the CLIP features of their captions; one caption of an image is drawn for every epoch."""

    def __init__(self, path: str | None, scale_factor: float):
        super().__init__(path, scale_factor)
        self.labels, self.num_classes = None, 0
        self.text = self._array("text", dims=2)
        self.captions = self._array("captions", dims=0, length=len(self) + 1).all()
        self.null_context = torch.from_numpy(self._array("null_text", dims=2, length=1).all()[0]).float()
        self.text_shape = self.text.shape
        if self.captions[0] != 0 or self.captions[-1] != len(self.text) or (np.diff(self.captions) < 1).any():
            raise UserError(f"{self.folder}: captions: expected every image to have some among {len(self.text)}")

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        picks = []
        for index, epoch in items:
            first, last = int(self.captions[index]), int(self.captions[index + 1])
            picks.append(first + int(np.random.default_rng((epoch, index)).integers(last - first)))
        context = torch.from_numpy(self.text.take(picks))
        return {**super().__getitems__(items), "context": context}

    def finish(self, raw: Batch, generator: torch.Generator) -> Batch:
        batch = super().finish(raw, generator)
        return {**batch, "context": batch["context"].float()}
