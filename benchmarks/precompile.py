"""Compile what the sampling and training benchmarks need, in parallel: `python -m benchmarks.precompile --workers 12`

Each case is compiled by one of several processes into inductor's and Triton's caches on disk (TORCHINDUCTOR_CACHE_DIR,
TRITON_CACHE_DIR), where the benchmarks find it. Blocks are compiled one by one, so a network of three has the code of
all; `compiled-graphs` takes the whole network.
"""

import argparse
import os
import time
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

COMPILED = ("torchao-fp8", "compiled-graphs", "compiled", "ours-fp8", "ours")


class Job(NamedTuple):
    """A call of a network.

    Args:
        batch: images per call, including unguided ones.
        policy: what a training step keeps; None: a call without gradients.
    """

    size: str
    provider: str
    batch: int
    policy: str | None


def jobs(sizes: Collection[str], what: Collection[str]) -> list[Job]:
    """List what the presets `peers` and `usit` of the sampling benchmark and the main and uncaptured rows of the
    training benchmark compile, the longest first. Float8 for few images, which comes last there, is left out.
    """
    from benchmarks.bench_sampling import PRESETS  # its torch reads what `main` sets

    found = []
    if "sampling" in what:
        for case in (*PRESETS["peers"], *PRESETS["usit"]):
            size, batch, guidance, _, who = case.split(":")
            images = int(batch) * (2 if guidance == "cfg" else 1)
            if size in sizes and who != "eager" and (who != "torchao-fp8" or images >= 50):
                found.append(Job(size, who, images, None))
        # float8 takes minutes, more for more images; graphs half a minute; the others seconds
        slow = {"torchao-fp8": 0, "compiled-graphs": 1}
        found = sorted(dict.fromkeys(found), key=lambda job: (slow.get(job.provider, 2), -job.batch))
    if "training" in what:
        compiling = ("torchao-fp8", "compiled", "ours")
        found += [Job(size, who, 128, policy) for policy in ("none", "block") for who in compiling for size in sizes]
        found += [Job("H", who, 16, "none") for who in ("compiled", "ours") if "H" in sizes]
    return found


def compile_one(job: Job, device: str, overrides: list[str]) -> float:
    """Compile and run once; return the seconds."""
    import torch

    from benchmarks import models

    began, training = time.monotonic(), job.policy is not None
    short = [] if job.provider == "compiled-graphs" else ["model.depth=2"]
    cfg = models.config(job.size, job.provider, job.policy or "none", [*short, *overrides])
    net = models.model(cfg, job.provider, device, job.batch, training)
    if training:
        models.loss(cfg, job.batch, device)(net).backward()
    else:
        x, t, y = models.images(cfg, job.batch, device)
        with torch.no_grad():
            net(x, t, y=y)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    del net
    torch.compiler.reset()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return time.monotonic() - began


def forget_choices() -> int:
    """Delete which variant of each kernel was the fastest: it was timed beside other processes. The variants stay."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    chosen = [*Path(cache_dir()).rglob("*.best_config")]
    for path in chosen:
        path.unlink()
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="sampling,training")
    parser.add_argument("--sizes", default="H,S,L,M,USiT")
    parser.add_argument("--providers", default=",".join(COMPILED))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="end after so many minutes, running cases included"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    args = parser.parse_args()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # of each worker
    from benchmarks.common import known, need_gpu  # its torch reads the line above
    from benchmarks.models import runnable

    providers = known(parser, "--providers", args.providers, COMPILED)
    need_gpu(parser, args.device)

    began, failed = time.monotonic(), 0
    asked = jobs(args.sizes.split(","), args.what.split(","))
    there = runnable([who for who in providers if any(job.provider == who for job in asked)], args.device)
    asked = [job for job in asked if job.provider in there]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, job, args.device, args.set): job for job in asked}
        limit = None if args.minutes == float("inf") else args.minutes * 60
        try:
            for future in as_completed(futures, limit):
                job, now, error = futures[future], time.monotonic() - began, future.exception()
                failed += error is not None
                said = f"{future.result():.0f} s" if error is None else f"not compiled: {str(error).splitlines()[0]}"
                print(
                    f"[{now:.0f} s] {job.size}, {job.batch} images, {job.provider}, {job.policy or 'sampling'}: {said}",
                    flush=True,
                )
        except TimeoutError:
            late = [job for future, job in futures.items() if not future.done()]
            print(
                f"out of time; not compiled: {', '.join(f'{j.size}:{j.batch}:{j.provider}' for j in late)}", flush=True
            )
            for worker in list(pool._processes.values()):  # the pool cannot end running work
                worker.terminate()
    print(f"{time.monotonic() - began:.0f} s, {forget_choices()} choices of kernels forgotten, {failed} cases failed")


if __name__ == "__main__":
    main()
