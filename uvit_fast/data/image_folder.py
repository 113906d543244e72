"""Images below a folder, decoded and cropped by Pillow."""

import copy
import math
import random
import warnings
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uvit_fast.data.datasets import Batch, Indexed, require_folder
from uvit_fast.data.reading import WHITE, BadImage, list_images, read_image, shown
from uvit_fast.data.transforms import CROPS, misfit, random_flip
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World


class ImageFolder(Indexed):
    """Images below a folder: one folder per class if `labelled`, any depth otherwise. Decoded and cropped by Pillow.

    An unreadable image ends the run with its name or, with `skip_unreadable`, is replaced, with a warning, by another
    one drawn for the item and the epoch.
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
        folder = require_folder(path, "images" + (", one folder per class" if labelled else ""))
        try:
            listing = list_images(folder, labelled)
        except UserError as error:
            raise UserError(f"data.path {error}") from None
        for note in listing.notes if World().rank == 0 else []:
            warnings.warn(f"data.path {shown(str(folder))}: {note}", stacklevel=3)
        self.folder, self.files = folder, listing.files  # names relative to it
        self.labels = listing.labels
        self.classes = tuple(listing.classes)  # the folders' names, by label
        self.num_classes = len(self.classes)
        tops = {file.partition("/")[0] if "/" in file else "" for file in self.files}  # "": in no folder
        self.unused_classes = 0 if labelled or "" in tops else len(tops)
        self.shape = (3, size, size)
        self.size, self.crop_name, self.flip, self.skip_unreadable = size, crop, flip, skip_unreadable
        self.background = background
        self.decoder = "Pillow, one core per loader process"  # what reads the pixels, in words
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
        """Return (3, size, size) uint8 for each index, and the index of the image that was actually read."""
        return [self._cropped(*self._load(*item)) for item in zip(indices, epochs)]

    def _cropped(self, image: Image.Image, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(CROPS[self.crop_name](image, self.size))).permute(2, 0, 1), index

    def _load(self, index: int, epoch: int) -> tuple[Image.Image, int]:
        """Return the image at `index` and its index; another one's if it cannot be read."""
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
        """Yield `index`, then all others in an order drawn for the pair, so that no image replaces many."""
        yield index
        draw = random.Random(index * 1_000_003 + epoch)
        first, step = draw.randrange(len(self)), draw.randrange(1, len(self) + 1)
        while math.gcd(step, len(self)) > 1:
            step = draw.randrange(1, len(self) + 1)
        yield from ((first + i * step) % len(self) for i in range(len(self)))
