"""How long does one image take, from the user's point of view? `python -m benchmarks.bench_latency`

Runs `uvit-fast sample --num 1` in processes of their own: 50 evaluations of DPM-Solver without guidance, decoded by a
KL-f8 autoencoder, all weights random, stored in fp32 as published ones are. Cases:

latency:<size>       ms from the request to the image's bytes on the host, with weights in memory and the loop captured
start:<size>         s of a process from its start until its image is written, and of its parts:
start:<size>:<part>  python (the interpreter), import (torch and what the command needs), device (its context), weights
                     (read, checked, on the device), autoencoder (likewise), kernels (loaded, or compiled), capture (of
                     the loop), image (drawn and written); kernels and capture are in image on a CPU

Kernels are compiled before, for all cases at once, into TRITON_CACHE_DIR; with --cold each process compiles its own:
cases start-cold. An H200's host takes some 100 s, most of it for that. Rows are written as they come.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

CHILD = "UVIT_FAST_BENCH_STARTED"  # the time at which the parent started the process
PROVIDERS = {"ours": "bf16", "ours-fp8": "fp8"}  # with their precision
SAMPLER = ["sample.sampler=dpm_fast", "sample.steps=50", "sample.guidance_scale=0"]


def settings(folder: str, more: list[str]) -> list[str]:
    """Return the overrides of a size's config."""
    from benchmarks.models import LATENT

    latent = [f"latent.autoencoder={folder}/vae", "latent.scale_factor=0.18215", "data.name=synthetic"]
    return [*LATENT, *latent, *SAMPLER, *more]


def prepare(sizes: list[str], folder: Path, more: list[str]) -> None:
    """Write random weights of networks and of an autoencoder, drawn on the device."""
    import torch
    from safetensors.torch import save_file

    from benchmarks import models
    from benchmarks.bench_sampling import kl
    from uvit_fast.build import build_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kl(device).float().save_pretrained(folder / "vae")
    for size in sizes:
        with device:
            net = build_model(models.config(size, "ours", overrides=more))
        save_file(net.state_dict(), folder / f"{size}.safetensors")


def child(size: str, precision: str, folder: str, more: list[str], images: int) -> None:
    """Run the command in this process, then draw some more images with what it loaded and captured; print seconds of
    the command's parts and ms of the later images as JSON.
    """
    marks = [("python", time.time())]

    def mark(part: str) -> None:
        marks.append((part, time.time()))

    import torch

    from benchmarks.models import CONFIGS
    from uvit_fast import cli
    from uvit_fast.data import autoencoders
    from uvit_fast.runtime import device
    from uvit_fast.runtime.graphs import CudaGraphs
    from uvit_fast.sampling import captured, jobs, loop, output, weights  # noqa: F401
    from uvit_fast.sampling import images as pictures

    mark("import")
    kept: dict[str, Any] = {"graphs": None}
    captured_sampler = captured.GraphSampler

    class MarkedGraphs(CudaGraphs):
        def warm_up(self, run):
            super().warm_up(run)
            torch.cuda.synchronize()
            mark("kernels")

        def capture(self, run, pool=None):
            found = super().capture(run, pool)
            mark("capture")
            return found

    def marked(part: str, owner: Any, name: str) -> Any:
        """Return a patch that lets a function mark its end, and keep its first argument and what it returned."""
        function = getattr(owner, name)

        def call(*args, **options):
            kept[part] = args[0], function(*args, **options)
            if part == "device":
                torch.zeros(1, device=kept[part][1])
            mark(part)
            return kept[part][1]

        return mock.patch.object(owner, name, call)

    def sampler(model, decode):
        kept["graphs"] = captured_sampler(model, decode, graphs=MarkedGraphs())
        return kept["graphs"]

    command = ["sample", "--config", CONFIGS[size], "--checkpoint", f"{folder}/{size}.safetensors", "--num", "1"]
    command += ["--precision", precision, "--out", f"{tempfile.mkdtemp(dir=folder)}/image.png"]
    with (
        contextlib.redirect_stdout(io.StringIO()),
        marked("device", device, "pick_device"),
        marked("weights", weights, "load_found"),
        marked("autoencoder", autoencoders, "load_decoder"),
        mock.patch.object(captured, "GraphSampler", sampler),
    ):
        code = cli.main([*command, *(word for each in settings(folder, more) for word in ("--set", each))])
    if code:
        raise SystemExit(code)
    mark("image")

    (cfg, model), (_, decode), graphs = kept["weights"], kept["autoencoder"], kept["graphs"]
    after = (lambda x: x) if graphs else decode
    times = []
    for seed in range(images):
        began = time.perf_counter()
        (x,) = loop.sample(model, cfg, 1, labels=torch.tensor([seed]), seed=seed, batch=1, graphs=graphs)
        pictures.to_uint8(loop.check_finite(after(x), "the sample"))
        times.append((time.perf_counter() - began) * 1e3)
    began = float(os.environ[CHILD])
    parts = {part: end - start for (part, end), start in zip(marks, [began, *(end for _, end in marks)])}
    print("\n" + json.dumps({"parts": parts, "images": times}))


def run_child(size: str, provider: str, folder: str, more: list[str], images: int, cold: bool = False) -> dict:
    """Return what `child` prints, run in a process of its own; what it says meanwhile passes through.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.bench_latency", "--child", folder, "--sizes", size]
    command += ["--providers", provider, "--images", str(images)]
    command += [word for each in more for word in ("--set", each)]
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, CHILD: str(time.time()), "OMP_WAIT_POLICY": "PASSIVE"} | (
            {"TRITON_CACHE_DIR": empty} if cold else {}
        )
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that draws ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="H,S")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--images", type=int, default=20, help="drawn after a process's first")
    parser.add_argument("--starts", type=int, default=1, help="processes of a case")
    parser.add_argument("--cold", action="store_true", help="compile the kernels again: cases start-cold")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--out", help="folder of latency.csv; default: benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.sizes, PROVIDERS[args.providers], args.child, args.set, args.images)
    began = time.monotonic()

    import torch

    from benchmarks import models
    from benchmarks.common import RESULTS, Rows, known

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {text}", flush=True)

    sizes = known(parser, "--sizes", args.sizes, models.CONFIGS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    providers = models.runnable(known(parser, "--providers", args.providers, PROVIDERS), device)
    cases = [(size, provider) for provider in providers for size in sizes]
    rows, start, failed = Rows("latency", args.out or RESULTS), "start-cold" if args.cold else "start", []
    with tempfile.TemporaryDirectory() as folder:
        prepare(sizes, Path(folder), settings(folder, args.set))
        say(f"random weights of {', '.join(sizes)} are written")
        if device == "cuda" and not args.cold:

            def fill(case: tuple[str, str]) -> None:
                parts = run_child(*case, folder, args.set, 0)["parts"]
                say(f"{' '.join(case)}: kernels are there after {parts['kernels']:.1f} s")

            with ThreadPoolExecutor(len(cases)) as pool:
                for future in [pool.submit(fill, case) for case in cases]:
                    future.exception()  # said again, and counted, below
        for size, provider in cases:
            common: dict[str, Any] = {"dtype": models.dtype(provider), "batch": 1, "metric": "time"}
            try:
                runs = [run_child(size, provider, folder, args.set, args.images, args.cold) for _ in range(args.starts)]
            except RuntimeError as error:
                say(f"{size} {provider}: not measured: {error}")
                failed.append(f"{size}:{provider}")
                continue
            say(f"{size} {provider}")
            if images := [ms for run in runs for ms in run["images"]]:
                rows.add(f"latency:{size}", provider, images, unit="ms", **common)
            totals = [sum(run["parts"].values()) for run in runs]
            rows.add(f"{start}:{size}", provider, totals, unit="s", **common)
            for part in runs[0]["parts"]:
                rows.add(f"{start}:{size}:{part}", provider, [r["parts"][part] for r in runs], unit="s", **common)
            rows.write()
    print(rows.write())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
