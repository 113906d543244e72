"""How long does one image take, from the user's point of view? `python -m benchmarks.bench_latency`

Runs `uvit-fast sample --num 1` in processes of their own: 50 evaluations of DPM-Solver without guidance, decoded by a
KL-f8 autoencoder, all weights random, stored in fp32 as published ones are. Cases:

latency:<size>       ms from the request to the image's bytes on the host, with weights in memory and the loop captured
start:<size>         s of a process from its start until its image is written, and of its parts:
start:<size>:<part>  python (the interpreter), import (torch and what the command needs), device (its context), weights
                     (read, checked, on the device), rounding (FP8's, with the first use of its kernels), autoencoder
                     (its library imported, read, on the device), kernels (loaded, or compiled, and the first
                     evaluations), capture (of an evaluation), image (the rest of it, decoded and written); kernels and
                     capture are in image on a CPU

Kernels are compiled before, for all cases at once, into TRITON_CACHE_DIR; with --cold each process compiles its own:
cases start-cold. Rows are written as they come.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import models
from benchmarks.autoencoders import kl
from benchmarks.common import RESULTS, Rows, known
from benchmarks.first_image import BEGAN
from uvit_fast.build import build_model
from uvit_fast.runtime.errors import in_one_line

PRECISIONS = {"ours": "bf16", "ours-fp8": "fp8"}  # by provider
SAMPLER = ["sample.sampler=dpm_fast", "sample.steps=50", "sample.guidance_scale=0"]


def settings(folder: str, more: list[str]) -> list[str]:
    """Return the overrides of a size's config."""
    latent = [f"latent.autoencoder={folder}/vae", "latent.scale_factor=0.18215", "data.name=synthetic"]
    return [*models.LATENT, *latent, *SAMPLER, *more]


def prepare(sizes: list[str], folder: str, more: list[str]) -> None:
    """Write random weights of networks and of an autoencoder, drawn on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kl(device).float().save_pretrained(f"{folder}/vae")
    for size in sizes:
        with device:
            net = build_model(models.config(size, "ours", overrides=more))
        save_file(net.state_dict(), f"{folder}/{size}.safetensors")


def started(size: str, provider: str, folder: str, more: list[str], images: int, cold: bool = False) -> dict[str, Any]:
    """Return what `first_image` prints, in a process of its own; what it says meanwhile passes through.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.first_image", "--config", models.CONFIGS[size]]
    command += ["--checkpoint", f"{folder}/{size}.safetensors", "--precision", PRECISIONS[provider]]
    command += ["--images", str(images), *(word for each in settings(folder, more) for word in ("--set", each))]
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as the command's own process has it
        environment |= {BEGAN: str(time.time())} | ({"TRITON_CACHE_DIR": empty} if cold else {})
        done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, stdout=-1, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that draws ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="H,S")
    parser.add_argument("--providers", default=",".join(PRECISIONS))
    parser.add_argument("--images", type=int, default=20, help="drawn by a process after its first")
    parser.add_argument("--starts", type=int, default=1, help="processes of a case")
    parser.add_argument("--cold", action="store_true", help="compile the kernels again: cases start-cold")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    sizes, began = known(parser, "--sizes", args.sizes, models.CONFIGS), time.monotonic()
    rows, failed = Rows("latency", args.out), []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    providers = models.runnable(known(parser, "--providers", args.providers, PRECISIONS), device)
    cases = [(size, provider) for provider in providers for size in sizes]

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        prepare(sizes, folder, settings(folder, args.set))
        say(f"random weights of {', '.join(sizes)} are written")

        def fill(case: tuple[str, str]) -> None:
            parts = started(*case, folder, args.set, 0)["parts"]
            say(f"{':'.join(case)}: kernels are compiled; that start took {sum(parts.values()):.1f} s")

        if device == "cuda" and cases and not args.cold:
            with ThreadPoolExecutor(len(cases)) as pool:
                for future in [pool.submit(fill, case) for case in cases]:
                    future.exception()  # whose case fails below again, and is named there
        for size, provider in cases:
            common: dict[str, Any] = {"dtype": models.dtype(provider), "batch": 1, "metric": "time"}
            try:
                runs = [started(size, provider, folder, args.set, args.images, args.cold) for _ in range(args.starts)]
            except RuntimeError as error:
                say(f"{size}:{provider}: not measured: {error}")
                failed.append(f"{size}:{provider}")
                continue
            say(f"{size}:{provider}")
            if images := [ms for run in runs for ms in run["images"]]:
                rows.add(f"latency:{size}", provider, images, unit="ms", **common)
            start = f"{'start-cold' if args.cold else 'start'}:{size}"
            rows.add(start, provider, [sum(run["parts"].values()) for run in runs], unit="s", **common)
            for part in runs[0]["parts"]:
                rows.add(f"{start}:{part}", provider, [run["parts"][part] for run in runs], unit="s", **common)
            rows.write()
    print(rows.write())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
