"""Images with labels, as the trainer takes them: `Dataset` says what that is, `Indexed` is what the ones here share."""

import copy
import gzip
import math
import operator
import pickle
import random
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.data.reading import WHITE, BadImage, list_images, read_image, shown
from uvit_fast.diffusion.noise import Draws
from uvit_fast.provenance import Described, Factors, Identities
from uvit_fast.provenance import shown as some
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.processes import World
from uvit_fast.runtime.text import cut

Batch = dict[str, Tensor]
CLASSES = {  # of datasets whose files have numbers only
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion_mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip


class Dataset(Described, Protocol):
    """What training takes.

    Attributes:
        shape: (C, H, W) of x. num_classes: labels that it can give; 0: none.
        text_shape: (T, C) of a text's features, null_context: (T, C), those of ""; None where there is no text.
        synthetic: whether the data are random. decoder: what reads the pixels, in words; None where there are none to read.
        views: consecutive items that show one image: 2 where its mirror image is one. numbers: of a part's items in the whole.
    """

    shape: tuple[int, ...]
    num_classes: int
    text_shape: tuple[int, ...] | None
    null_context: Tensor | None
    synthetic: bool
    decoder: str | None
    numbers: np.ndarray | None

    @property
    def views(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitems__(self, items: list[tuple[int, int]], /) -> Batch:
        """The raw batch of (index, epoch) pairs: CPU tensors. The same pair always gives the same values."""

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        """The network's inputs of a raw batch that is already on the device: `x` fp32 in [-1, 1] (or scaled latents), (B, C, H, W); `y`
        int64 (B,) where there are labels; `context` fp32 (B, T, C) where there is text. Whatever is random (flips, the posterior of
        latents) is drawn here, from the `Draws` of the step.
        """

    def part(self, items: np.ndarray) -> "Dataset":
        """These items (n,) alone, in their order; what takes the place of a damaged one is among them, too."""


class Indexed(torch.utils.data.Dataset, ABC):
    """A `Dataset` of images without text, of which nothing more is known; `dataset[i]` and torch's DataLoader get items as the network
    takes them, one by one.

    Such an item is a dict of `x` fp32 (C, H, W) and, where there are any, `y` int64 () and `context` fp32 (T, C); what is random about it
    comes from torch's generator.
    """

    shape: tuple[int, ...]
    num_classes: int
    text_shape: tuple[int, ...] | None = None
    null_context: Tensor | None = None
    synthetic = False
    decoder: str | None = None
    classes: tuple[str, ...] = ()
    encoders: Identities = {}
    scaling: Factors | None = None
    numbers: np.ndarray | None = None

    @property
    def views(self) -> int:
        return 1

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def raw(self, items: list[tuple[int, int]]) -> Batch:
        """The raw batch of (index, epoch) pairs."""

    @abstractmethod
    def finish(self, raw: Batch, draws: Draws) -> Batch:
        """The network's inputs of a raw batch."""

    def part(self, items: np.ndarray) -> "Indexed":
        raise TypeError("a dataset of which some images are held out defines part")

    @overload
    def __getitems__(self, items: list[tuple[int, int]], /) -> Batch: ...
    @overload
    def __getitems__(self, items: list[int], /) -> list[Batch]: ...
    def __getitems__(self, items: Any, /) -> Any:
        """The raw batch of pairs; of plain indices the list of their items."""
        if items and isinstance(items[0], tuple):
            return self.raw(items)
        batch = self.finish(self.raw([(int(i), 0) for i in items]), Draws(torch.default_generator))
        return [{name: value[n] for name, value in batch.items()} for n in range(len(items))]

    def __getitem__(self, index: int) -> Batch:
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(
                f"expected an index, got {cut(repr(index))}; torch.utils.data.Subset takes several"
            ) from None
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        return self.__getitems__([index % len(self)])[0]


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
    """scikit-learn's 1,797 handwritten digits: (1, 8, 8), 17 grey levels, labels 0-9 (UCI optical recognition test set).

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
    """CIFAR-10's training set from the "python version" batches in `path`: 50,000 of (3, 32, 32), labels 0-9 where `labelled`."""
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
        except Exception as error:  # a pickle's content raises whatever its parts do
            raise UserError(
                f"data.path {folder / name}: expected a CIFAR-10 python batch ({cut(str(error))})"
            ) from None
    return TensorImages(torch.cat(images), torch.cat(labels) if labelled else None, 255.0, flip, CLASSES["cifar10"])


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays, numbers and texts. Anything else that a pickle can name, and would run, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in {
            ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
            ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.numeric", "_frombuffer"),
        }:  # fmt: skip
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is not loaded since it could run code")
        return super().find_class(module, name)


def fashion_mnist(path: str | None, flip: bool) -> TensorImages:
    """Fashion-MNIST's training set from its idx files in `path`, gzipped or not: 60,000 of (1, 28, 28), labels 0-9.

    Debian's package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist.
    """
    folder = require_folder(path, "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz")
    images, labels = _idx(folder, "train-images-idx3-ubyte", 3), _idx(folder, "train-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise UserError(f"data.path {folder}: expected a label for each of {len(images)} images, got {len(labels)}")
    return TensorImages(images[:, None], labels.long(), 255.0, flip, CLASSES["fashion_mnist"])


def _idx(folder: Path, name: str, dims: int) -> Tensor:
    """An idx file of bytes: two zeros, the type (8: uint8), the number of dimensions, their big-endian lengths, the values."""
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


class ImageFolder(Indexed):
    """Images below a folder: one folder a class where `labelled`, any depth otherwise. Decoded and cropped by Pillow.

    An unreadable image ends the run with its name, or, where `skip_unreadable`, another one takes its place with a warning: one that is drawn
    for the item and the epoch.
    """

    def __init__(
        self,
        path: str | None,
        size: int,
        crop: str,
        flip: bool,
        labelled: bool,
        skip_unreadable: bool = False,
        background: tuple[int, int, int] = WHITE,
    ):
        folder = require_folder(path, "images" + (", one folder a class" if labelled else ""))
        try:
            listing = list_images(folder, labelled)
        except UserError as error:
            raise UserError(f"data.path {error}") from None
        for note in listing.notes if World().rank == 0 else []:
            warnings.warn(f"data.path {shown(str(folder))}: {note}", stacklevel=3)
        self.folder, self.files = folder, listing.files  # names below it
        self.labels = listing.labels
        self.classes = tuple(listing.classes)  # the folders' names, by label
        self.num_classes = len(self.classes)
        self.shape = (3, size, size)
        self.size, self.crop_name, self.flip, self.skip_unreadable = size, crop, flip, skip_unreadable
        self.background = background
        self.decoder = "Pillow, on one core a loader process"  # what reads the pixels, in words
        self._warned: set[Path] = set()

    def __len__(self) -> int:
        return len(self.files)

    def raw(self, items: list[tuple[int, int]]) -> Batch:
        found = self._read_all([index for index, _ in items], [epoch for _, epoch in items])
        raw = {"x": torch.stack([x for x, _ in found])}
        if self.labels is not None:
            raw["y"] = torch.tensor([self.labels[i] for _, i in found])
        return raw

    def part(self, items: np.ndarray) -> "ImageFolder":
        part = copy.copy(self)
        part.files = [self.files[i] for i in items]
        part.labels = None if self.labels is None else [self.labels[i] for i in items]
        return part

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        x = raw["x"].float() / 127.5 - 1
        return {**raw, "x": random_flip(x, draws) if self.flip else x}

    def _read_all(self, indices: list[int], epochs: Iterable[int] = repeat(0)) -> list[tuple[Tensor, int]]:
        """(3, size, size) uint8 of each index, and the index that it has in truth."""
        return [self._cropped(*self._load(*item)) for item in zip(indices, epochs)]

    def _cropped(self, image: Image.Image, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(CROPS[self.crop_name](image, self.size))).permute(2, 0, 1), index

    def _load(self, index: int, epoch: int) -> tuple[Image.Image, int]:
        """The image at `index` and its index; another one's where it cannot be read."""
        for other in self._substitutes(index, epoch):
            file = self.folder / self.files[other]
            try:
                image, _ = read_image(file, self.background)
            except BadImage as error:
                message = f"{shown(str(file))}: not a readable image ({error})"
                if not self.skip_unreadable:
                    raise UserError(f"{message}; data.unreadable=skip would leave it out") from None
                if file not in self._warned:
                    self._warned.add(file)
                    warnings.warn(f"{message}; another one takes its place", stacklevel=4)
            else:
                if reason := misfit(self.crop_name, image.size):
                    raise UserError(f"{shown(str(file))}: {reason}")
                return image, other
        raise UserError(f"{shown(str(self.folder))}: not one readable image among {len(self)}")

    def _substitutes(self, index: int, epoch: int) -> Iterator[int]:
        """`index`, then all others in an order that the pair draws, so that no image takes the place of many."""
        yield index
        draw = random.Random(index * 1_000_003 + epoch)
        first, step = draw.randrange(len(self)), draw.randrange(1, len(self) + 1)
        while math.gcd(step, len(self)) > 1:
            step = draw.randrange(1, len(self) + 1)
        yield from ((first + i * step) % len(self) for i in range(len(self)))


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
        self.length = 1_281_167  # ImageNet's size, so that epochs are as long as the real ones

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


def split(dataset: Indexed, held_out: int) -> tuple[Indexed, Indexed]:
    """A dataset without so many images, drawn once and for all, and these.

    Of an image and its mirror image neither is in the first, and the image alone in the second.

    Raises:
        UserError: there are no more images than these.
    """
    images = len(dataset) // dataset.views
    if held_out >= images:
        raise UserError(f"evaluate.held_out: expected fewer than all {images} images of the data, got {held_out}")
    chosen = np.zeros(images, bool)
    chosen[np.random.default_rng(0).permutation(images)[:held_out]] = True
    rest = dataset.part(numbers := np.flatnonzero(np.repeat(~chosen, dataset.views)))
    rest.numbers = numbers
    return rest, dataset.part(np.flatnonzero(chosen) * dataset.views)


def random_flip(x: Tensor, draws: Draws) -> Tensor:
    """Mirror each image of (B, C, H, W) with probability 1/2."""
    coin = draws.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(coin, x.flip(-1), x)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with a box filter while twice too large, bicubic to the short side, crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def misfit(crop: str, size: tuple[int, int]) -> str | None:
    """Why an image of (width, height) `size` is none for this crop: a key of CROPS; None: it is one."""
    if crop != "celeba" or size == (178, 218):
        return None
    return (
        f"data.crop=celeba expects CelebA's aligned images of 178 x 218 pixels, got {size[0]} x {size[1]}; "
        "data.crop=center fits images of any size"
    )


def celeba_crop(image: Image.Image, size: int) -> Image.Image:
    """CelebA's 128 x 128 pixels about row 121, column 89, resized to size x size.

    Raises:
        UserError: not CelebA's 178 x 218 pixels, where alone that is the face.
    """
    if reason := misfit("celeba", image.size):
        raise UserError(reason)
    row, column = 121, 89
    return image.crop((column - 64, row - 64, column + 64, row + 64)).resize((size, size), Image.Resampling.BILINEAR)


def square_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square, resized with Lanczos: the crop of MS-COCO."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


CROPS = {"center": center_crop, "celeba": celeba_crop, "square": square_crop}


def require_folder(path: str | None, holding: str, key: str = "data.path") -> Path:
    """`path` as an existing, non-empty folder, or a UserError that names the `key` and says what it should hold."""
    if path is None:
        raise UserError(f"{key}: not set; expected a folder with {holding}")
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{key} {folder}: no such folder; expected {holding}")
    if not any(folder.iterdir()):
        raise UserError(f"{key} {folder}: the folder is empty; expected {holding}")
    return folder


def check_fits(dataset: Dataset, cfg: Config) -> None:
    """Refuse data that the model cannot take.

    Raises:
        UserError: another image shape, more labels than the model has classes, or too few labels or texts for it.
    """
    expected = (cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)
    if dataset.shape != expected:
        raise UserError(
            f"data {cfg.data.name}: model.img_size and in_chans expect items of {expected}, got {dataset.shape}"
        )
    null = cfg.null_label is not None and not dataset.synthetic
    room = cfg.model.num_classes - null
    if cfg.model.num_classes and not dataset.num_classes:
        raise UserError(
            f"data {cfg.data.name}: expected labels, for model.num_classes={cfg.model.num_classes}, got none"
        )
    if cfg.model.num_classes and dataset.num_classes > room:
        names = dataset.classes
        raise UserError(
            f"data {cfg.data.name}: {dataset.num_classes} classes{f' ({some(names)})' if names else ''}"
            f"{' and the null label of train.p_uncond' if null else ''} need more than "
            f"model.num_classes={cfg.model.num_classes}: set model.num_classes={dataset.num_classes + null}"
        )
    if 0 < dataset.num_classes < room:
        warnings.warn(
            f"data {cfg.data.name}: {dataset.num_classes} classes for the {room} of model.num_classes; "
            f"labels from {dataset.num_classes} on learn nothing",
            stacklevel=3,
        )
    if cfg.model.context_dim:
        text = (cfg.model.context_tokens, cfg.model.context_dim)
        got = dataset.text_shape
        if got != text:
            raise UserError(f"data {cfg.data.name}: expected text features of {text} an item, got {got or 'no text'}")
