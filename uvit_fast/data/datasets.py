"""What training takes as data: the protocol `Dataset`, its base class `Indexed`, and checks."""

import operator
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.diffusion.noise import Draws
from uvit_fast.provenance import Described, Factors, Identities
from uvit_fast.provenance import shown as some
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import cut

Batch = dict[str, Tensor]


class Dataset(Described, Protocol):
    """The data of a training run.

    Attributes:
        shape: (C, H, W) of x. num_classes: number of possible labels; 0: none.
        text_shape: (T, C) of a text's features. null_context: (T, C), those of "". Both None without text.
        unused_classes: folders of images that would be classes, where none are asked for.
        synthetic: whether the data are random. decoder: what decodes the pixels, in words; None if there are none to
            decode.
        views: consecutive items that show one image: 2 if its mirror image follows it. numbers: for a part, its items'
            indices in the whole dataset.
    """

    shape: tuple[int, ...]
    num_classes: int
    unused_classes: int
    text_shape: tuple[int, ...] | None
    null_context: Tensor | None
    synthetic: bool
    decoder: str | None
    numbers: np.ndarray | None

    @property
    def views(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitems__(self, items: list[tuple[int, int]], /) -> Batch:
        """Return the raw batch of (index, epoch) pairs, CPU tensors; the same pair always gives the same values."""

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        """Return the network's inputs from a raw batch that is already on the device: `x` (B, C, H, W) fp32 in [-1, 1],
        or scaled latents; `y` (B,) int64 with labels; `context` (B, T, C) fp32 with text. All random choices (flips,
        the posterior of latents) are drawn here, from the step's `Draws`.
        """

    def part(self, items: np.ndarray) -> "Dataset":
        """Return a dataset of these items (n,) alone, in order; a damaged one is replaced by another of them."""


class Indexed(torch.utils.data.Dataset, ABC):
    """A `Dataset` of images without text or known provenance. `dataset[i]` and torch's DataLoader get items one by one,
    as the network takes them.

    Such an item is a dict of `x` (C, H, W) fp32 and, if there are any, `y` () int64 and `context` (T, C) fp32; random
    choices come from torch's generator.
    """

    shape: tuple[int, ...]
    num_classes: int
    unused_classes: int = 0
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
        """Return the raw batch of (index, epoch) pairs."""

    @abstractmethod
    def finish(self, raw: Batch, draws: Draws) -> Batch:
        """Return the network's inputs from a raw batch."""

    def part(self, items: np.ndarray) -> "Indexed":
        raise TypeError("a dataset of which some images are held out defines part")

    @overload
    def __getitems__(self, items: list[tuple[int, int]], /) -> Batch: ...
    @overload
    def __getitems__(self, items: list[int], /) -> list[Batch]: ...
    def __getitems__(self, items: Any, /) -> Any:
        """Return the raw batch of pairs, or the list of items of plain indices."""
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


def split(dataset: Indexed, held_out: int) -> tuple[Indexed, Indexed]:
    """Return a dataset without `held_out` images, drawn by a fixed seed, and those images.

    An image and its mirror image are both missing from the first; the second has the image alone.

    Raises:
        UserError: the dataset has no more images than that.
    """
    images = len(dataset) // dataset.views
    if held_out >= images:
        hint = f"; --set evaluate.held_out={-(-images // 10)} holds out a tenth" if images > 1 else ""
        raise UserError(f"evaluate.held_out: expected fewer than all {images} images of the data, got {held_out}{hint}")
    chosen = np.zeros(images, bool)
    chosen[np.random.default_rng(0).permutation(images)[:held_out]] = True
    rest = dataset.part(numbers := np.flatnonzero(np.repeat(~chosen, dataset.views)))
    rest.numbers = numbers
    return rest, dataset.part(np.flatnonzero(chosen) * dataset.views)


def require_folder(path: str | None, holding: str, key: str = "data.path") -> Path:
    """Return `path` as an existing, non-empty folder, or raise a UserError that says what `key` expects."""
    if path is None:
        raise UserError(f"{key}: not set; expected a folder with {holding}")
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{key} {folder}: a file; expected a folder with {holding}")
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
