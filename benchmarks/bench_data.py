"""How fast does the data come? Pillow's decoding and cropping; moments at random, packed against one file an item.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_data

Everything here runs on the CPU, and the files are in the system's cache: a disk that is slower than that sets its own limit.
Moments are random: speed does not depend on the values.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import RESULTS, Rows
from uvit_fast.data import shards
from uvit_fast.data.datasets import ImageFolder
from uvit_fast.data.latents import Latents

BATCH = 256


def seconds(f, repeats: int = 7) -> list[float]:
    f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return times


def moments(rows: Rows, folder: Path, count: int, size: int) -> None:
    """`count` items of 4-channel latents of size x size: opening (of single files: listing the folder), reading all at
    random in batches, and bytes an item on the disk."""
    items = np.random.default_rng(0).standard_normal((count, 8, size, size)).astype(np.float16)
    packed, single = folder / "packed", folder / "single"
    shards.pack(packed, {"moments": items, "labels": np.arange(count) % 1000})
    single.mkdir()
    for i, item in enumerate(items):  # the layout of the published code: one .npy an item, and its label in another
        np.save(single / f"{i}.npy", item)
        np.save(single / f"{i}_label.npy", i % 1000)
    order = np.random.default_rng(1).permutation(count).tolist()
    batches = [order[first : first + BATCH] for first in range(0, count, BATCH)]
    dataset = Latents(str(packed), 0.18215)

    def read_packed():
        for batch in batches:
            dataset.__getitems__([(i, 0) for i in batch])

    def read_single():
        for batch in batches:
            x = [np.load(single / f"{i}.npy") for i in batch]
            y = [np.load(single / f"{i}_label.npy") for i in batch]
            torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(y))

    case = f"moments:4x{size}x{size}:{count}"
    layouts = {
        "ours": (packed, lambda: Latents(str(packed), 0.18215), read_packed),
        "file-an-item": (single, lambda: [entry.name for entry in os.scandir(single)], read_single),
    }
    for provider, (where, opened, read) in layouts.items():

        def add(values: list[float], metric: str, unit: str, batch: int, provider: str = provider) -> None:
            rows.add(f"{case}:{metric}", provider, values, metric=metric, unit=unit, dtype="fp16", batch=batch)

        add([t * 1e3 for t in seconds(opened)], "open", "ms", 1)
        add([count / t for t in seconds(read, repeats=5)], "random-read", "items/s", BATCH)
        add([sum(file.stat().st_blocks * 512 for file in where.iterdir()) / count], "disk", "bytes/item", 1)


def pillow(rows: Rows, folder: Path, sizes: list[int], threads: int) -> None:
    """JPEG photographs of 640 x 427 pixels, decoded and cropped: ADM's centre crop."""
    from sklearn.datasets import load_sample_images

    images = folder / "images"
    images.mkdir()
    for i in range(64):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        photo.save(images / f"{i}.jpg", quality=92)
    for size in sizes:
        dataset = ImageFolder(str(images), size, "center", flip=False, labelled=False)
        for n in (1, threads):
            with ThreadPoolExecutor(n) as pool:
                parts = [[(i, 0)] for i in range(len(dataset))]
                times = seconds(lambda: list(pool.map(dataset.__getitems__, parts)), repeats=5)  # noqa: B023
            speed = [len(dataset) / t for t in times]
            name = f"decode-crop:{size}px:{n}thread" + "s" * (n > 1)
            rows.add(name, "pillow", speed, metric="speed", unit="images/s", dtype="uint8", batch=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000, help="moments in each layout")
    parser.add_argument("--latents", type=int, nargs="+", default=[32, 64], help="sides of the latents")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="sides of the images, in pixels")
    parser.add_argument("--threads", type=int, default=2, help="that decode images")
    parser.add_argument("--out", default=RESULTS, help="folder of the .csv")
    args = parser.parse_args()
    rows = Rows("data", args.out)
    rows.common["device"] = f"cpu ({os.cpu_count()} cores)"
    for size in args.latents:
        with tempfile.TemporaryDirectory() as folder:
            moments(rows, Path(folder), args.items * 32**2 // size**2, size)
    with tempfile.TemporaryDirectory() as folder:
        pillow(rows, Path(folder), args.sizes, args.threads)
    print(f"wrote {rows.write()}")


if __name__ == "__main__":
    main()
