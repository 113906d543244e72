"""The process that `bench_latency` measures: `uvit-fast sample --num 1`, with the time told at the end of each part.

Nothing heavy is imported before the first mark.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from typing import Any
from unittest import mock

BEGAN = "UVIT_FAST_BENCH_BEGAN"  # the time at which the parent started the process


def main(argv: list[str] | None = None) -> None:
    """Run the command in this process, then draw some more images with what it loaded; print seconds of the command's
    parts and ms of the later images as JSON.
    """
    marks = [("python", time.time())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--images", type=int, default=0, help="drawn after the command's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the config")
    args = parser.parse_args(argv)

    def mark(part: str) -> None:
        marks.append((part, time.time()))

    from uvit_fast import cli
    from uvit_fast.commands import sample

    kept: dict[str, Any] = {}
    patches, preload = contextlib.ExitStack(), sample.preload

    def preload_and_mark(*modules: str) -> None:
        preload(*modules)
        mark("import")
        patch_what_was_imported()

    def patch_what_was_imported() -> None:
        import torch

        from uvit_fast.data import autoencoders
        from uvit_fast.model import replayed
        from uvit_fast.runtime import device
        from uvit_fast.runtime.graphs import CudaGraphs
        from uvit_fast.sampling import weights

        class MarkedGraphs(CudaGraphs):
            def warm_up(self, run):
                super().warm_up(run)
                torch.cuda.synchronize()
                if "kernels" not in dict(marks):
                    mark("kernels")

            def capture(self, run, pool=None):
                found = super().capture(run, pool)
                mark("capture")
                return found

        def marked(part: str | None, owner: Any, name: str) -> None:
            """Let a function mark its end, if a part ends there, and keep its first argument and what it returned."""
            function = getattr(owner, name)

            def call(*values, **options):
                kept[name] = values[0], function(*values, **options)
                if part == "device":
                    torch.zeros(1, device=kept[name][1])  # makes its context
                if part:
                    if torch.cuda.is_initialized():
                        torch.cuda.synchronize()
                    mark(part)
                return kept[name][1]

            patches.enter_context(mock.patch.object(owner, name, call))

        marked("device", device, "pick_device")
        marked("weights", weights, "load_weights")
        marked("rounding" if args.precision == "fp8" else None, weights, "load_found")
        marked("autoencoder", autoencoders, "load_decoder")
        patches.enter_context(mock.patch.object(replayed, "CudaGraphs", MarkedGraphs))

    with (
        patches,
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(sample, "preload", preload_and_mark),
    ):
        command = ["sample", "--config", args.config, "--checkpoint", args.checkpoint, "--precision", args.precision]
        command += [word for each in args.set for word in ("--set", each)]
        command += ["--num", "1", "--out", f"{folder}/image.png"]
        with mock.patch.object(sys, "argv", ["uvit-fast", *command]):
            code = cli.main(None if argv is None else command)  # which takes this process for the command's own
        mark("image")
    if code:
        raise SystemExit(code)
    times = _later_images(args.images, *kept["load_found"], kept["load_decoder"][1]) if args.images else []
    ends = [float(os.environ[BEGAN]), *(end for _, end in marks)]
    print("\n" + json.dumps({"parts": {m[0]: m[1] - end for m, end in zip(marks, ends)}, "images": times}))


def _later_images(count: int, cfg: Any, model: Any, decode: Any) -> list[float]:
    """Return the milliseconds of each, from the request to the bytes on the host; on a GPU, all replay one loop.

    Raises:
        SystemExit: they do not.
    """
    import torch

    from uvit_fast.sampling.captured import on_a_gpu
    from uvit_fast.sampling.images import to_uint8
    from uvit_fast.sampling.loop import check_finite, sample

    graphs = on_a_gpu(model, decode)
    after, times = decode if graphs is None else lambda x: x, []
    for seed in range(1 + count):
        began = time.perf_counter()
        (x,) = sample(model, cfg, 1, labels=torch.tensor([seed]), seed=seed, batch=1, graphs=graphs)
        to_uint8(check_finite(after(x), "the sample"))
        times.append((time.perf_counter() - began) * 1e3)
    if graphs is not None and graphs.captures != 1:
        raise SystemExit(f"expected one captured loop, which later images replay; got {graphs.captures}")
    return times[1:]  # the first one captures


if __name__ == "__main__":
    main()
