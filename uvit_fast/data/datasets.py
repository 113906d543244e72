"""Images with labels, as the trainer takes them.

A dataset has a length and three more things:
- `__getitems__([(index, epoch), ...])` gives a raw batch: a dict of CPU tensors. The same pair always gives the same values.
- `finish(raw, generator)` turns the raw batch, already on the device, into the network's inputs: `x` fp32 in [-1, 1] (or
  scaled latents), (B, C, H, W); `y` int64 (B,) where there are labels; `context` fp32 (B, T, C) where there is text. Whatever is
  random (flips, the posterior of latents) is drawn here, from the generator of the step.
- `shape`, the (C, H, W) of x; `num_classes`, labels it can give (0: none); `synthetic`, whether the data is random.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uvit_fast.config import Config, UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Batch = dict[str, Tensor]


class TensorImages:
    """Images that fit in memory.

    Args:
        images: (N, C, H, W), values in [0, peak], any dtype.
        labels: (N,) int64, or None.
        peak: the value that means white; [0, peak] becomes [-1, 1].
        flip: mirror each image with probability 1/2.
    """

    synthetic = False

    def __init__(self, images: Tensor, labels: Tensor | None, peak: float, flip: bool):
        self.images, self.labels, self.peak, self.flip = images, labels, peak, flip
        self.shape = tuple(images.shape[1:])
        self.num_classes = 0 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        index = torch.tensor([i for i, _ in items])
        raw = {"x": self.images[index]}
        if self.labels is not None:
            raw["y"] = self.labels[index]
        return raw

    def finish(self, raw: Batch, generator: torch.Generator) -> Batch:
        x = raw["x"].float() * (2 / self.peak) - 1
        return {**raw, "x": random_flip(x, generator) if self.flip else x}


def digits() -> TensorImages:
    """scikit-learn's 1,797 handwritten digits: (1, 8, 8), 17 grey levels, labels 0-9 (UCI optical recognition test set).

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("data.name=digits needs scikit-learn: pip install uvit-fast[digits]") from None
    images, labels = load_digits(return_X_y=True)  # (N, 64) in 0..16
    return TensorImages(
        torch.from_numpy(images).float().view(-1, 1, 8, 8), torch.from_numpy(labels).long(), 16.0, False
    )


def cifar10(path: str | None, flip: bool) -> TensorImages:
    """CIFAR-10's training set from the "python version" batches in `path`: 50,000 of (3, 32, 32), without labels."""
    folder = require_folder(path, "the CIFAR-10 python batches, data_batch_1 to data_batch_5")
    images = []
    for name in [f"data_batch_{i}" for i in range(1, 6)]:
        if not (folder / name).is_file():
            raise UserError(f"data.path {folder}: no {name}; expected the CIFAR-10 python batches")
        with open(folder / name, "rb") as file:
            images.append(torch.from_numpy(pickle.load(file, encoding="bytes")[b"data"]).view(-1, 3, 32, 32))
    return TensorImages(torch.cat(images), None, 255.0, flip)


class ImageFolder:
    """Images below a folder: one folder a class where `labelled`, any depth otherwise. Decoded and cropped by Pillow."""

    synthetic = False

    def __init__(self, path: str | None, size: int, crop: str, flip: bool, labelled: bool):
        folder = require_folder(path, "images" + (", one folder a class" if labelled else ""))
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise UserError(
                f"data.path {folder}: no images; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        classes = sorted({p.relative_to(folder).parts[0] for p in self.files if len(p.relative_to(folder).parts) > 1})
        number = {name: i for i, name in enumerate(classes)}
        if labelled and not all(len(p.relative_to(folder).parts) > 1 for p in self.files):
            raise UserError(f"data.path {folder}: expected one folder a class, got images that lie in none")
        self.labels = [number[p.relative_to(folder).parts[0]] for p in self.files] if labelled else None
        self.num_classes = len(classes) if labelled else 0
        self.shape = (3, size, size)
        self.size, self.crop, self.flip = size, CROPS[crop], flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        raw = {"x": torch.stack([self._read(self.files[i]) for i, _ in items])}
        if self.labels is not None:
            raw["y"] = torch.tensor([self.labels[i] for i, _ in items])
        return raw

    def finish(self, raw: Batch, generator: torch.Generator) -> Batch:
        x = raw["x"].float() / 127.5 - 1
        return {**raw, "x": random_flip(x, generator) if self.flip else x}

    def _read(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                return torch.from_numpy(np.array(self.crop(image.convert("RGB"), self.size))).permute(2, 0, 1)
        except OSError as error:
            raise UserError(f"{file}: not a readable image ({error})") from None


class Synthetic:
    """Random images of any shape, to measure speed and memory: nothing can be learned from them."""

    synthetic = True
    pool = 512  # distinct items; more would only cost memory

    def __init__(self, shape: tuple[int, int, int], num_classes: int, text_shape: tuple[int, int] | None):
        generator = torch.Generator().manual_seed(0)
        self.shape, self.num_classes, self.text_shape = shape, num_classes, text_shape
        self.x = torch.randn(self.pool, *shape, generator=generator)
        self.y = torch.randint(num_classes, (self.pool,), generator=generator) if num_classes else None
        self.text = torch.randn(16, *text_shape, generator=generator) if text_shape else None
        self.null_context = torch.zeros(text_shape) if text_shape else None

    def __len__(self) -> int:
        return 1_281_167  # ImageNet's size, so that epochs are as long as the real ones

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        index = torch.tensor([i for i, _ in items])
        raw = {"x": self.x[index % self.pool]}
        if self.y is not None:
            raw["y"] = self.y[index % self.pool]
        if self.text is not None:
            raw["context"] = self.text[index % len(self.text)]
        return raw

    def finish(self, raw: Batch, generator: torch.Generator) -> Batch:
        return raw


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of (B, C, H, W) with probability 1/2."""
    coin = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator) < 0.5
    return torch.where(coin, x.flip(-1), x)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with a box filter while twice too large, bicubic to the short side, crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def celeba_crop(image: Image.Image, size: int) -> Image.Image:
    """CelebA's 128 x 128 pixels about row 121, column 89, resized to size x size."""
    row, column = 121, 89
    return image.crop((column - 64, row - 64, column + 64, row + 64)).resize((size, size), Image.Resampling.BILINEAR)


CROPS = {"center": center_crop, "celeba": celeba_crop}


def require_folder(path: str | None, holding: str) -> Path:
    """`path` as an existing, non-empty folder, or a UserError that says what it should hold."""
    if path is None:
        raise UserError(f"data.path: not set; expected a folder with {holding}")
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"data.path {folder}: no such folder; expected {holding}")
    if not any(folder.iterdir()):
        raise UserError(f"data.path {folder}: the folder is empty; expected {holding}")
    return folder


def check_fits(dataset: Any, cfg: Config) -> None:
    """Refuse data that the model cannot take.

    Raises:
        UserError: another image shape, more labels than the model has classes, or too few labels or texts for it.
    """
    expected = (cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)
    if dataset.shape != expected:
        raise UserError(
            f"data {cfg.data.name}: model.img_size and in_chans expect items of {expected}, got {dataset.shape}"
        )
    room = cfg.model.num_classes - (cfg.null_label is not None and not dataset.synthetic)
    if cfg.model.num_classes and not 0 < dataset.num_classes <= room:
        raise UserError(f"data {cfg.data.name}: expected labels of 1 to {room} classes, got {dataset.num_classes}")
    if cfg.model.context_dim:
        text = (cfg.model.context_tokens, cfg.model.context_dim)
        got = getattr(dataset, "text_shape", None)
        if got != text:
            raise UserError(f"data {cfg.data.name}: expected text features of {text} an item, got {got or 'no text'}")
