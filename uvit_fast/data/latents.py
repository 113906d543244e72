"""Latents of a frozen autoencoder, packed: moments.npy and its neighbours, memory-mapped.

A folder holds `moments.npy` (N, 2C, h, w), fp16: mean and log variance of the posterior, of every image and of its mirror image;
`labels.npy` (N,) where images have classes; for text `text.npy` (captions, T, C), fp16, `captions.npy` (N + 1,): image i has the
captions captions[i] to captions[i + 1] - 1; and `null_text.npy` (T, C), the features of "".
One .npy opens in a millisecond and reads at random without a file system in the way, where 2.5 million files do not.
"""

from pathlib import Path

import numpy as np
import torch

from uvit_fast.config import UserError
from uvit_fast.data.datasets import Batch, require_folder


class Latents:
    """Posterior moments; `finish` samples the posterior afresh: z = scale_factor * (mean + std * eps).

    Args:
        path: the folder.
        scale_factor: 0.18215 for Stable Diffusion's autoencoder on ImageNet, 0.23010 on COCO.

    Raises:
        UserError: a file that is missing, truncated, or of another length than its neighbours.
    """

    synthetic = False

    def __init__(self, path: str | None, scale_factor: float):
        self.folder = require_folder(path, "moments.npy of the training images")
        self.scale_factor = scale_factor
        self.moments = _map(self.folder / "moments.npy", dims=4)
        if self.moments.shape[1] % 2:
            raise UserError(
                f"{self.folder / 'moments.npy'}: expected mean and logvar, got {self.moments.shape[1]} channels"
            )
        has_labels = (self.folder / "labels.npy").is_file()
        self.labels = _map(self.folder / "labels.npy", dims=1, length=len(self)) if has_labels else None
        self.shape = (self.moments.shape[1] // 2, *self.moments.shape[2:])
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.moments)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        index = [i for i, _ in items]
        raw = {"moments": torch.from_numpy(np.stack([self.moments[i] for i in index]))}
        if self.labels is not None:
            raw["y"] = torch.from_numpy(np.asarray(self.labels[index], dtype=np.int64))
        return raw

    def finish(self, raw: Batch, generator: torch.Generator) -> Batch:
        mean, logvar = raw.pop("moments").float().chunk(2, dim=1)  # (B, C, h, w) each
        std = (0.5 * logvar.clamp(-30, 20)).exp()
        eps = torch.randn(mean.shape, device=mean.device, generator=generator)
        return {**raw, "x": self.scale_factor * (mean + std * eps)}


class TextLatents(Latents):
    """Latents with the CLIP features of their captions; one caption of an image is drawn for every epoch."""

    def __init__(self, path: str | None, scale_factor: float):
        super().__init__(path, scale_factor)
        self.labels, self.num_classes = None, 0
        self.text = _map(self.folder / "text.npy", dims=3)
        self.captions = np.asarray(_map(self.folder / "captions.npy", dims=1, length=len(self) + 1))
        self.null_context = torch.from_numpy(np.array(_map(self.folder / "null_text.npy", dims=2))).float()
        self.text_shape = tuple(self.text.shape[1:])
        if self.captions[-1] != len(self.text) or (np.diff(self.captions) < 1).any():
            raise UserError(
                f"{self.folder / 'captions.npy'}: expected every image to have captions among {len(self.text)}"
            )

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        picks = []
        for index, epoch in items:
            first, last = int(self.captions[index]), int(self.captions[index + 1])
            picks.append(first + int(np.random.default_rng((epoch, index)).integers(last - first)))
        context = torch.from_numpy(np.stack([self.text[i] for i in picks]))
        return {**super().__getitems__(items), "context": context}

    def finish(self, raw: Batch, generator: torch.Generator) -> Batch:
        batch = super().finish(raw, generator)
        return {**batch, "context": batch["context"].float()}


def _map(file: Path, dims: int, length: int | None = None) -> np.ndarray:
    if not file.is_file():
        raise UserError(f"{file}: no such file in the data folder")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: truncated or not an .npy file ({error})") from None
    if array.ndim != dims or (length is not None and len(array) != length):
        wanted = f"{dims} dimensions" + (f" and length {length}" if length is not None else "")
        raise UserError(f"{file}: expected {wanted}, got shape {array.shape}")
    return array
