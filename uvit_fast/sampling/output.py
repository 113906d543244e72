"""Write samples as numbered PNGs, or as ADM's sample file."""

import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from uvit_fast.provenance import Provenance
from uvit_fast.runtime.files import file_name, write_whole
from uvit_fast.sampling.images import as_picture


def sample_names(labels: list[int] | None, prompts: list[str] | None, known: Provenance) -> list[str] | None:
    """Return what follows the number in the samples' file names: class207_otter, or class207 without a known name; for
    prompts, what a file name can hold of them. None without either.
    """
    if labels is None:
        return prompts and [file_name(prompt) for prompt in prompts]
    numbers = {label: f"class{label}" for label in set(labels)}
    named = {i: file_name(known.name(i)) if known.name(i) != str(i) else "" for i in numbers}
    return ["_".join(filter(None, (numbers[label], named[label]))) for label in labels]


def save_pngs(folder: Path, batches: Iterable[np.ndarray], names: list[str] | None, first: int = 0) -> None:
    """Write one PNG per image of batches (B, H, W, C) uint8, numbered from `first`: 000000.png, or 000000_name.png with
    `names`.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save(numbered: tuple[int, np.ndarray]) -> None:
        i, image = numbered
        name = f"{i:06d}" + (f"_{names[i]}" if names and names[i] else "")
        as_picture(image).save(folder / f"{name}.png")

    with ThreadPoolExecutor() as pool:  # compression releases the GIL
        for images in batches:
            list(pool.map(save, enumerate(images, first)))
            first += len(images)


def save_npz(path: Path, batches: Iterable[np.ndarray], num: int, labels: np.ndarray | None) -> None:
    """Write ADM's sample file: arr_0 uint8 (N, H, W, C), and arr_1 int64 labels if there are any.

    Args:
        batches: (B, H, W, C) uint8 each, `num` images together; one batch at a time is in memory.
    """

    def write(temporary: Path) -> None:
        written = 0
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                for images in batches:
                    if not written:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (num, *images.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.ascontiguousarray(images, np.uint8).data)
                    written += len(images)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, labels)
        assert written == num

    write_whole(path, write)
