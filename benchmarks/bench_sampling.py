"""Seconds for 500 samples of 50 network evaluations, without decoding: `python -m benchmarks.bench_sampling`.

Cases `<S|M|L|H>:<batch>:<cfg|nocfg>:latent` in s_per_500. `ours` is the captured loop, `ours-uncaptured` the same without its graph.
"""

import argparse

import torch

from benchmarks import models
from benchmarks.common import RESULTS, Rows, measure
from uvit_fast.build import build_sampler
from uvit_fast.diffusion.cudagraph import GraphSampler
from uvit_fast.diffusion.guidance import Guidance


@torch.inference_mode()
def seconds(size: str, provider: str, batch: int, guided: bool, evaluations: int) -> list[float]:
    """Seconds for 500 samples at 50 evaluations; one loop of `evaluations` is timed and scaled."""
    cfg = models.config(size, provider)
    net = models.model(cfg, provider).eval()
    sampler = build_sampler(
        cfg.model_copy(update={"sample": cfg.sample.model_copy(update={"sampler": "dpm_fast"})}), evaluations
    )
    x, _, y = models.images(cfg, batch)
    scale, null = 0.4 if guided else 0.0, {"y": 1000}
    if provider == "ours":
        graphs = GraphSampler(net)

        def run():
            return graphs(sampler, x, {"y": y}, null, scale)
    else:
        eps_fn = Guidance(net, {"y": y}, null, scale) if guided else lambda x, t: net(x, t, y=y)

        def run():
            with models.precision(provider):
                return sampler(eps_fn, x)

    times = measure(run, repeats=3, warmup=2)
    return [t / 1e3 * (50 / evaluations) * (500 / batch) for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="S,M,L,H")
    parser.add_argument("--providers", default="ours,ours-uncaptured,eager,compiled")
    parser.add_argument("--batches", default="1,50,500")
    parser.add_argument("--guidance", default="nocfg,cfg")
    parser.add_argument(
        "--evaluations", type=int, default=50, help="evaluations that are timed; the result is scaled to 50"
    )
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    rows = Rows("sampling", args.out)
    rows.ceilings()
    for size in args.sizes.split(","):
        for batch in map(int, args.batches.split(",")):
            for guided in args.guidance.split(","):
                for provider in args.providers.split(","):
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    case, common = f"{size}:{batch}:{guided}:latent", {"dtype": "bf16", "batch": batch}
                    times = seconds(size, provider, batch, guided == "cfg", args.evaluations)
                    rows.add(case, provider, times, metric="time", unit="s_per_500", **common)
                    rows.add(
                        case, provider, [torch.cuda.max_memory_allocated() / 1e9], metric="peak", unit="GB", **common
                    )
    print(rows.write())


if __name__ == "__main__":
    main()
