"""How fast is the data path? Decoding and cropping by DALI and Pillow; random reads of posteriors, packed against one
file per item.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_data

Everything runs on the CPU, with the files in the system's cache: a slower disk sets its own limit. Posteriors are
random: speed does not depend on the values.
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

from benchmarks.common import RESULTS, Rows, seconds
from uvit_fast.data import shards
from uvit_fast.data.dali import DaliImages, why_not
from uvit_fast.data.image_folder import ImageFolder
from uvit_fast.data.latents import Latents
from uvit_fast.runtime.errors import in_one_line

BATCH = 256


def posteriors(rows: Rows, folder: Path, count: int, size: int) -> None:
    """Measure `count` items of 4-channel latents of size x size: opening (of single files: listing the folder), reading
    all at random in batches, and bytes per item on the disk. Ours in fp16, as `uvit-fast extract` writes by default;
    single files as the published code writes them: fp32 posterior and label, pickled.
    """
    items = np.random.default_rng(0).standard_normal((count, 8, size, size)).astype(np.float16)
    packed, single = folder / "packed", folder / "single"
    shards.pack(packed, {"moments": items, "labels": np.arange(count) % 1000})
    single.mkdir()
    for i, item in enumerate(items):
        pair = np.empty(2, object)
        pair[:] = item.astype(np.float32), np.int64(i % 1000)
        np.save(single / f"{i}.npy", pair)
    order = np.random.default_rng(1).permutation(count).tolist()
    batches = [order[first : first + BATCH] for first in range(0, count, BATCH)]
    dataset = Latents(str(packed), 0.18215)  # only the first opening reads everything, to verify it

    def read_packed():
        for batch in batches:
            dataset.__getitems__([(i, 0) for i in batch])

    def read_single():
        for batch in batches:
            pairs = [np.load(single / f"{i}.npy", allow_pickle=True) for i in batch]
            torch.from_numpy(np.stack([x for x, _ in pairs])), torch.tensor([int(y) for _, y in pairs])

    case = f"posteriors:4x{size}x{size}:{count}"
    layouts = {
        "ours": ("fp16", packed, lambda: Latents(str(packed), 0.18215), read_packed),
        "file-an-item": ("fp32", single, lambda: [entry.name for entry in os.scandir(single)], read_single),
    }
    for provider, (dtype, where, opened, read) in layouts.items():

        def add(
            values: list[float], metric: str, unit: str, batch: int, name: str = provider, kind: str = dtype
        ) -> None:
            rows.add(f"{case}:{metric}", name, values, metric=metric, unit=unit, dtype=kind, batch=batch)

        add([t * 1e3 for t in seconds(opened, 8)[1:]], "open", "ms", 1)
        add([count / t for t in seconds(read, 6)[1:]], "random-read", "items/s", BATCH)
        add([sum(file.stat().st_blocks * 512 for file in where.iterdir()) / count], "disk", "bytes/item", 1)


def decoders(rows: Rows, folder: Path, sizes: list[int], threads: int) -> None:
    """Decode and crop JPEG photographs of 640 x 427 pixels (ADM's centre crop), with DALI and Pillow by turns."""
    from sklearn.datasets import load_sample_images

    images = folder / "images"
    images.mkdir()
    for i in range(64):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        photo.save(images / f"{i}.jpg", quality=92)
    reason = why_not()
    if reason:
        print(f"no rows of DALI: {reason}")
    cores = sorted(os.sched_getaffinity(0))
    for size in sizes:
        for n in (1, threads):
            os.sched_setaffinity(0, cores[:n])  # DALI takes as many threads as there are cores
            torch.set_num_threads(1)  # otherwise PyTorch's, one per core, wait for each other on the n that are left
            pillow = ImageFolder(str(images), size, "center", flip=False, labelled=False)
            times: dict[str, list[float]] = {}
            items = [(i, 0) for i in range(len(pillow))]
            with ThreadPoolExecutor(n) as pool:
                reads = {"pillow": lambda: list(pool.map(pillow.__getitems__, [[item] for item in items]))}  # noqa: B023
                if not reason:
                    ours = DaliImages(str(images), size, "center", flip=False, labelled=False)
                    reads["dali"] = lambda: ours.__getitems__(items)  # noqa: B023
                for turn in range(6):  # the first is a warm-up
                    for provider, read in reads.items():
                        start = time.perf_counter()
                        read()
                        times.setdefault(provider, []).extend([time.perf_counter() - start] if turn else [])
            for provider, taken in times.items():
                name = f"decode-crop:{size}px:{n}thread" + "s" * (n > 1)
                speed = [len(items) / t for t in taken]
                rows.add(name, provider, speed, metric="speed", unit="images/s", dtype="uint8", batch=len(items))
    os.sched_setaffinity(0, cores)


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000, help="posteriors in each layout")
    parser.add_argument("--latents", type=int, nargs="+", default=[32, 64], help="sides of the latents")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="sides of the images, in pixels")
    parser.add_argument("--threads", type=int, default=2, help="that decode images")
    parser.add_argument("--out", default=RESULTS, help="folder of the .csv")
    args = parser.parse_args()
    rows = Rows("data", args.out)
    rows.common["device"] = f"cpu ({os.cpu_count()} cores)"
    for size in args.latents:
        with tempfile.TemporaryDirectory() as folder:
            posteriors(rows, Path(folder), args.items * 32**2 // size**2, size)
    with tempfile.TemporaryDirectory() as folder:
        decoders(rows, Path(folder), args.sizes, args.threads)
    print(f"wrote {rows.write()}")


if __name__ == "__main__":
    main()
