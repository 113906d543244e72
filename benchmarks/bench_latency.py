"""How long does one image take, from the user's point of view? `python -m benchmarks.bench_latency`

Cases of `uvit-fast sample --num 1`, with the published sampler and steps, decoded by a KL-f8 autoencoder, all weights
random: `latency:<size>`, ms from the request to the image's bytes on the host, with weights in memory and the loop
captured; `start:<size>`, seconds of a process from its start to its first image, and `start:<size>:<part>` of its
parts: python (the interpreter), import (torch and what the command needs), weights (read, checked, on the device),
autoencoder (likewise, with its package), first (kernels found or compiled, the loop captured, the image sampled).
Compiled kernels are those of earlier processes, in TRITON_CACHE_DIR; with --cold the cache is empty.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from uvit_fast.runtime.errors import UserError

CHILD = "UVIT_FAST_BENCH_STARTED"  # the time at which the parent started the process


def overrides(folder: str, more: list[str]) -> list[str]:
    from benchmarks.models import LATENT

    return [*LATENT, f"latent.autoencoder={folder}/vae", "latent.scale_factor=0.18215", "data.name=synthetic", *more]


def prepare(size: str, folder: Path, more: list[str]) -> None:
    """Write random weights of the network and of an autoencoder."""
    import torch
    from safetensors.torch import save_file

    from benchmarks import models
    from benchmarks.bench_sampling import kl

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = models.model(models.config(size, "ours", overrides=more), "ours", device)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "weights.safetensors")
    kl(torch.device(device)).save_pretrained(folder / "vae")


def child(size: str, folder: str, more: list[str], repeats: int) -> None:
    """Sample one image in this process, then some more; print seconds of its parts and ms of the later ones as JSON."""
    marks = [("python", time.time())]

    def mark(part: str) -> None:
        marks.append((part, time.time()))

    import torch

    from benchmarks.models import CONFIGS
    from uvit_fast.config import load_config
    from uvit_fast.data.autoencoders import load_decoder
    from uvit_fast.runtime.device import pick_device
    from uvit_fast.sampling.captured import GraphSampler
    from uvit_fast.sampling.images import to_uint8
    from uvit_fast.sampling.loop import check_finite, sample
    from uvit_fast.sampling.weights import load_for_sampling

    mark("import")
    cfg = load_config(CONFIGS[size], overrides(folder, more))
    device = pick_device("auto")
    model = load_for_sampling(cfg, f"{folder}/weights.safetensors", device)
    mark("weights")
    decode = load_decoder(cfg, device)
    mark("autoencoder")
    graphs = GraphSampler(model, decode) if device.type == "cuda" else None
    after = (lambda x: x) if graphs else decode

    def draw(seed: int) -> None:
        (x,) = sample(model, cfg, 1, labels=torch.tensor([seed]), seed=seed, batch=1, graphs=graphs)
        to_uint8(check_finite(after(x), "the sample"))

    draw(0)
    mark("first")
    times = []
    for seed in range(repeats):
        began = time.perf_counter()
        draw(seed)
        times.append((time.perf_counter() - began) * 1e3)
    began = float(os.environ[CHILD])
    parts = {part: end - start for (part, end), start in zip(marks, [began, *(end for _, end in marks)])}
    print("\n" + json.dumps({"parts": parts, "images": times}))


def run_child(size: str, folder: Path, more: list[str], repeats: int, cold: bool) -> dict:
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, CHILD: str(time.time())} | ({"TRITON_CACHE_DIR": empty} if cold else {})
        command = [sys.executable, "-m", "benchmarks.bench_latency", "--child", str(folder), "--sizes", size]
        command += ["--repeats", str(repeats), *(word for setting in more for word in ("--set", setting))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{size}: the process that draws failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="H,S")
    parser.add_argument("--repeats", type=int, default=20, help="images after the first")
    parser.add_argument("--starts", type=int, default=3, help="processes")
    parser.add_argument("--cold", action="store_true", help="compile the kernels again: cases start-cold")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--out", help="folder of latency.csv; default: benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.sizes, args.child, args.set, args.repeats)
    from benchmarks.common import RESULTS, Rows, known
    from benchmarks.models import CONFIGS

    sizes = known(parser, "--sizes", args.sizes, CONFIGS)
    rows = Rows("latency", args.out or RESULTS)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            prepare(size, Path(folder), args.set)
            if not args.cold:
                run_child(size, Path(folder), args.set, 0, False)  # fills the caches of kernels and files
            runs = [run_child(size, Path(folder), args.set, args.repeats, args.cold) for _ in range(args.starts)]
        common = {"dtype": "bf16", "batch": 1, "metric": "time"}
        start = "start-cold" if args.cold else "start"
        totals = [sum(run["parts"].values()) for run in runs]
        rows.add(f"{start}:{size}", "ours", totals, unit="s", **common)
        for part in runs[0]["parts"]:
            rows.add(f"{start}:{size}:{part}", "ours", [run["parts"][part] for run in runs], unit="s", **common)
        if images := [ms for run in runs for ms in run["images"]]:
            rows.add(f"latency:{size}", "ours", images, unit="ms", **common)
        rows.write()
    print(rows.path)


if __name__ == "__main__":
    main()
