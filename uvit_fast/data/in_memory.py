"""Small datasets, whole in memory: digits, CIFAR-10, Fashion-MNIST, and random data."""

import copy
import gzip
import math
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvit_fast.data.datasets import Batch, Indexed, require_folder
from uvit_fast.data.transforms import random_flip
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.text import cut

CLASSES = {  # of datasets whose files have only numbers
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion_mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip


class TensorImages(Indexed):
    """Images that fit in memory.

    Args:
        images: (N, C, H, W), values in [0, peak], any dtype.
        labels: (N,) int64, or None.
        peak: the value that means white; [0, peak] becomes [-1, 1].
        flip: mirror each image with probability 1/2.
        classes: the labels' names.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, peak: float, flip: bool, classes: tuple[str, ...] = ()):
        self.images, self.labels, self.peak, self.flip = images, labels, peak, flip
        self.classes = classes if labels is not None else ()
        self.shape = tuple(images.shape[1:])
        self.num_classes = 0 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def raw(self, items: list[tuple[int, int]]) -> Batch:
        index = torch.tensor([i for i, _ in items])
        raw = {"x": self.images[index]}
        if self.labels is not None:
            raw["y"] = self.labels[index]
        return raw

    def part(self, items: np.ndarray) -> "TensorImages":
        part = copy.copy(self)
        part.images, part.labels = self.images[items], None if self.labels is None else self.labels[items]
        return part

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        x = raw["x"].float() * (2 / self.peak) - 1
        return {**raw, "x": random_flip(x, draws) if self.flip else x}


def digits() -> TensorImages:
    """Return scikit-learn's 1,797 handwritten digits: (1, 8, 8), 17 grey levels, labels 0-9 (UCI optical recognition
    test set).

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing("data.name=digits", "scikit-learn", "digits") from None
    images, labels = load_digits(return_X_y=True)  # (N, 64) in 0..16
    return TensorImages(
        torch.from_numpy(images).float().view(-1, 1, 8, 8),
        torch.from_numpy(labels).long(),
        16.0,
        False,
        CLASSES["digits"],
    )


def cifar10(path: str | None, flip: bool, labelled: bool) -> TensorImages:
    """Return CIFAR-10's training set from the "python version" batches in `path`: 50,000 of (3, 32, 32), with labels
    0-9 if `labelled`.
    """
    folder = require_folder(path, "the CIFAR-10 python batches, data_batch_1 to data_batch_5")
    images, labels = [], []
    for name in [f"data_batch_{i}" for i in range(1, 6)]:
        if not (folder / name).is_file():
            raise UserError(f"data.path {folder}: no {name}; expected the CIFAR-10 python batches")
        try:
            with open(folder / name, "rb") as file:
                batch = _ArraysOnly(file, encoding="bytes").load()
            images.append(torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32))
            labels.append(torch.tensor(batch[b"labels"], dtype=torch.int64).view(len(images[-1])))
        except Exception as error:  # unpickling raises whatever its content does
            raise UserError(
                f"data.path {folder / name}: expected a CIFAR-10 python batch ({cut(str(error))})"
            ) from None
    return TensorImages(torch.cat(images), torch.cat(labels) if labelled else None, 255.0, flip, CLASSES["cifar10"])


class _ArraysOnly(pickle.Unpickler):
    """Unpickle NumPy arrays, numbers and strings; refuse anything else that a pickle could name, and run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in {
            ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
            ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.numeric", "_frombuffer"),
        }:  # fmt: skip
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is not loaded since it could run code")
        return super().find_class(module, name)


def fashion_mnist(path: str | None, flip: bool) -> TensorImages:
    """Return Fashion-MNIST's training set from its idx files in `path`, gzipped or not: 60,000 of (1, 28, 28), labels
    0-9.

    Debian's package dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist.
    """
    folder = require_folder(path, "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz")
    images, labels = _idx(folder, "train-images-idx3-ubyte", 3), _idx(folder, "train-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise UserError(f"data.path {folder}: expected a label for each of {len(images)} images, got {len(labels)}")
    return TensorImages(images[:, None], labels.long(), 255.0, flip, CLASSES["fashion_mnist"])


def _idx(folder: Path, name: str, dims: int) -> Tensor:
    """Read an idx file of bytes: two zeros, the type (8: uint8), the number of dimensions, their big-endian lengths,
    the values.
    """
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise UserError(f"data.path {folder}: no {name} or {name}.gz")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: truncated or not gzip ({error})") from None
    header = 4 + 4 * dims
    if data[:4] != bytes([0, 0, 8, dims]) or len(data) < header:
        raise UserError(f"{file}: expected an idx file of bytes in {dims} dimensions")
    lengths = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if len(data) - header != math.prod(lengths):
        raise UserError(f"{file}: truncated: expected {math.prod(lengths)} values, got {len(data) - header}")
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(lengths)


class Synthetic(Indexed):
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
        self.length = 1_281_167  # ImageNet's size, for epochs of realistic length

    def __len__(self) -> int:
        return self.length

    def part(self, items: np.ndarray) -> "Synthetic":
        part = copy.copy(self)
        part.length = len(items)
        return part

    def raw(self, items: list[tuple[int, int]]) -> Batch:
        index = torch.tensor([i for i, _ in items])
        raw = {"x": self.x[index % self.pool]}
        if self.y is not None:
            raw["y"] = self.y[index % self.pool]
        if self.text is not None:
            raw["context"] = self.text[index % len(self.text)]
        return raw

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        return raw
