"""Images cropped by NVIDIA DALI on all CPU cores at once, with the results of Pillow's path.

The same reader reads the files, in threads, so that an odd or damaged file means the same with both; DALI resizes.
Which images, in which order, and their flips are decided elsewhere: see `uvit_fast.training.loader` and
`ImageFolder.finish`.
"""

import functools
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uvit_fast.data.image_folder import ImageFolder
from uvit_fast.runtime.extras import install

CHUNK = 64  # decoded images held at a time


def why_not() -> str | None:
    """Return why DALI cannot be used here, or None if it can."""
    try:
        from nvidia.dali import fn, pipeline_def, types  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        return f"DALI is not installed ({' '.join(str(error).split())}); {install('dali')}"
    return None


@dataclass(frozen=True)
class Plan:
    """How one image is cropped. Sizes and corners are (height, width) and (top, left), in pixels.

    Attributes:
        corner, box: cut out first. halvings: sizes of the successive halvings. size: resized to this then.
        start: corner of the final square.
    """

    corner: tuple[int, int]
    box: tuple[int, int]
    halvings: list[tuple[int, int]] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    start: tuple[int, int] = (0, 0)


def image_folder(decoder: str, num_workers: int, *arguments: Any, **options: Any) -> ImageFolder:
    """Return an ImageFolder with `decoder` "dali", "pillow", or "auto", the faster one. Its `decoder` says in words
    which one it is and why.

    Per core Pillow crops more images, but it uses one core per loader process, of `num_workers`; DALI uses all cores.
    """
    reason = None
    if decoder == "auto":
        cores = _cores()
        busy = f"data.num_workers={num_workers} keeps every core busy; cores here: {cores}"
        reason = busy if num_workers >= cores else why_not()
    if decoder == "dali" or decoder == "auto" and reason is None:
        return DaliImages(*arguments, **options)
    images = ImageFolder(*arguments, **options)
    if reason:
        images.decoder = f"{images.decoder} ({reason})"
    return images


class DaliImages(ImageFolder):
    """An ImageFolder with the same items, labels, order and refusals; pixels differ by less than 1 of 255 on average.

    Raises:
        ImportError: DALI is not installed; the message names the extra.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        if reason := why_not():
            raise ImportError(f"data.decoder=dali: {reason}")
        import nvidia.dali

        self.decoder = f"DALI {nvidia.dali.__version__} on {_cores()} cores, shared by the loader processes"
        # by process: a fork inherits its parent's without the threads, and would wait for them to end
        self._readers: dict[int, ThreadPoolExecutor] = {}
        self._pipelines: dict[int, tuple[int, Any]] = {}  # halvings, pipeline

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}, "_pipelines": {}}  # each process has its own

    def _read_all(self, indices: list[int], epochs: Iterable[int] = repeat(0)) -> list[tuple[Tensor, int]]:
        items = list(zip(indices, epochs))
        return [found for first in range(0, len(items), CHUNK) for found in self._chunk(items[first : first + CHUNK])]

    def _chunk(self, items: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        if os.getpid() not in self._readers:
            self._readers[os.getpid()] = ThreadPoolExecutor(_threads())
        jobs = [self._readers[os.getpid()].submit(self._load, *item) for item in items]
        read = [job.result() for job in jobs]
        large = [image for image, _ in read if self._is_large(image)]
        cropped: Iterator[Tensor] = iter(self._run(large) if large else [])
        return [
            (next(cropped), index) if self._is_large(image) else self._cropped(image, index) for image, index in read
        ]

    def _is_large(self, image: Image.Image) -> bool:
        """Return whether DALI's filters agree with Pillow's: they are coarse where pixels are much enlarged."""
        return 2 * min(image.size) >= self.size

    def _run(self, images: list[Image.Image]) -> Tensor:
        """Return the crops, (B, 3, size, size) uint8."""
        plans = [PLANS[self.crop_name](image.size, self.size) for image in images]
        needed = max(len(plan.halvings) for plan in plans)
        halvings, pipeline = self._pipelines.get(os.getpid(), (0, None))
        if pipeline is None or halvings < needed:
            _survive_forks()
            halvings, pipeline = needed, _pipeline(self.crop_name, self.size, needed)
            self._pipelines[os.getpid()] = halvings, pipeline
        pixels = [np.asarray(image) for image in images]  # (H, W, 3) uint8 each
        (cropped,) = pipeline.run(data=pixels, **_inputs(plans, self.crop_name, halvings))
        return torch.from_numpy(np.array(cropped.as_tensor())).permute(0, 3, 1, 2)


@functools.cache
def _survive_forks() -> None:
    """Keep a fork's parent's pipelines from being collected in the child, where their threads are missing."""
    os.register_at_fork(after_in_child=gc.freeze)


def _center(size: tuple[int, int], side: int) -> Plan:
    """Plan `transforms.center_crop`."""
    width, height = size
    halvings = []
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        halvings.append((height, width))
    scale = side / min(width, height)
    width, height = round(width * scale), round(height * scale)
    start = (height - side) // 2, (width - side) // 2
    return Plan((0, 0), (size[1], size[0]), halvings, (height, width), start)


def _celeba(size: tuple[int, int], side: int) -> Plan:
    """Plan `transforms.celeba_crop`, for images that fit it."""
    return Plan((57, 25), (128, 128), size=(side, side))


def _square(size: tuple[int, int], side: int) -> Plan:
    """Plan `transforms.square_crop`."""
    short = min(size)
    return Plan(((size[1] - short) // 2, (size[0] - short) // 2), (short, short), size=(side, side))


PLANS = {"center": _center, "celeba": _celeba, "square": _square}


def _pipeline(crop: str, side: int, halvings: int) -> Any:
    """Return the pipeline from images, uint8 (H, W, 3) each, to crops, uint8 (B, side, side, 3)."""
    from nvidia.dali import fn, pipeline_def, types

    filters = {"center": types.INTERP_CUBIC, "celeba": types.INTERP_LINEAR, "square": types.INTERP_LANCZOS3}

    def given(name: str) -> Any:
        return fn.external_source(name=name, ndim=1)

    def mean(a: Any, b: Any) -> Any:
        """Return (a + b + 1) // 2 of bytes, without overflow. A table halves them in half the time of a division."""
        half = fn.lookup_table(a ^ b, keys=list(range(256)), values=[n // 2 for n in range(256)], dtype=types.UINT8)
        return (a | b) - half

    def halve(x: Any, i: int) -> Any:
        """Apply Pillow's box filter: the mean of two columns, rounded up, then of two rows.

        An odd side is halved as if its middle pixel did not exist: `nearest` does that with windows shifted by half a
        pixel to either side. Images with fewer halvings have windows of their own size and pass through unchanged.
        """
        shift = given(f"shift{i}")  # (2,): (0.5, 0.5) or zeros
        size, full = given(f"half{i}"), given(f"full{i}")

        def pick(down: int, right: int) -> Any:
            move = shift * types.Constant(np.array([2 * down - 1, 2 * right - 1], np.float32))
            return fn.resize(x, size=size, roi_start=move, roi_end=full + move, interp_type=types.INTERP_NN)

        return mean(mean(pick(0, 0), pick(0, 1)), mean(pick(1, 0), pick(1, 1)))

    @pipeline_def(
        batch_size=CHUNK,
        num_threads=_threads(),
        device_id=None,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        x = fn.external_source(name="data", ndim=3, layout="HWC", no_copy=True)
        if crop != "center":
            x = fn.slice(x, start=given("corner"), shape=given("box"), axes=(0, 1))
        for i in range(halvings):
            x = halve(x, i)
        x = fn.resize(x, size=given("size"), interp_type=filters[crop])
        return fn.slice(x, start=given("start"), shape=[side, side], axes=(0, 1)) if crop == "center" else x

    pipeline = graph()
    pipeline.build()
    return pipeline


def _inputs(plans: list[Plan], crop: str, halvings: int) -> dict[str, list[np.ndarray]]:
    def floats(pairs: Sequence[tuple[float, float]]) -> list[np.ndarray]:
        return [np.array(pair, np.float32) for pair in pairs]

    def integers(pairs: list[tuple[int, int]]) -> list[np.ndarray]:
        return [np.array(pair, np.int32) for pair in pairs]

    inputs = {"size": floats([plan.size for plan in plans])}
    if crop != "center":
        inputs["corner"], inputs["box"] = integers([p.corner for p in plans]), integers([p.box for p in plans])
        return inputs
    inputs["start"] = integers([p.start for p in plans])
    sizes = [plan.box for plan in plans]
    for i in range(halvings):
        halves = [plan.halvings[i] if i < len(plan.halvings) else size for plan, size in zip(plans, sizes)]
        shifts = [(0.5, 0.5) if half != size else (0.0, 0.0) for half, size in zip(halves, sizes)]
        inputs |= {f"half{i}": floats(halves), f"full{i}": floats(sizes), f"shift{i}": floats(shifts)}
        sizes = halves
    return inputs


def _cores() -> int:
    """Return this rank's share of the host's cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _threads() -> int:
    """Return this loader process's share of them."""
    worker = torch.utils.data.get_worker_info()
    return max(1, _cores() // (worker.num_workers if worker else 1))
