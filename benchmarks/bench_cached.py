"""How long do 500 samples take with cached layers? `python -m benchmarks.bench_cached`

Cases `<S|M|L|H>:<batch>:<plan>`: captured loops of 50 evaluations of DPM-Solver++ 2M on 32 x 32 x 4 latents, with
random weights, without guidance, in bf16 (`ours`) and in FP8 (`ours-fp8`). A plan is one from `PLANS`, which imitate
the literature as noted there, or a value of `sample.cache`. Only their speed is measured: what they cost in quality
depends on the checkpoint (docs/caching.md).

Metrics: time, s_per_500: loops of the batch scaled to 500 samples; peak, GB (10^9 bytes) allocated, weights and kept
outputs included; reused, % of all attentions and MLPs in all evaluations. Rows are written as they come.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from benchmarks import models
from benchmarks.bench_sampling import enough, peak_of, reset_peak
from benchmarks.common import RESULTS, Rows
from uvit_fast.build import build_sampler
from uvit_fast.config import Config
from uvit_fast.diffusion.caching import Plan
from uvit_fast.diffusion.stages import Sampler
from uvit_fast.model.cached import sublayers
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.sampling.captured import GraphSampler

STEPS = 50


def _at(evaluations: Sequence[int], reused: Callable[[list[str]], list[str]]) -> Callable[[list[str]], Plan]:
    return lambda names: tuple(frozenset(reused(names) if i in evaluations else ()) for i in range(STEPS))


PLANS: dict[str, Callable[[list[str]], Plan]] = {
    "none": _at((), list),
    # Learning-to-Cache (Ma et al. 2024) on U-ViT-H/2, 50 evaluations: at most all layers in every second evaluation, 24
    # of them, and, as its routers learned, 94% of those, the others mostly in the last blocks
    "alternate": _at(range(2, STEPS, 2), list),
    "learned": _at(range(2, STEPS, 2), lambda names: names[:-4]),
    # SmoothCache (Liu et al. 2024): at most three evaluations in a row, the first and the last uncached
    "three-of-four": _at([i for i in range(1, STEPS - 1) if i % 4], list),
}
CASES = ["none", "outer:2:4", "alternate", "learned", "outer:3", "three-of-four"]


def planned(cfg: Config, name: str) -> Sampler:
    """Return the sampler with a plan from `PLANS`, or from a value of `sample.cache`."""
    settings = {"sampler": "dpmpp_2m", "steps": STEPS, "cache": "none" if name in PLANS else name}
    sampler = build_sampler(cfg.model_copy(update={"sample": cfg.sample.model_copy(update=settings)}))
    return sampler.caching(PLANS[name](sublayers(cfg.model.depth))) if name in PLANS else sampler


def bench(rows: Rows, case: str, provider: str, cfg: Config, graphs: GraphSampler) -> None:
    """Add the rows of one case; the loops of `graphs` are dropped."""
    _, batch, plan = case.split(":", 2)
    sampler, device = planned(cfg, plan), next(graphs.model.parameters()).device
    x, _, y = models.images(cfg, int(batch), device)
    reset_peak(device)
    if not graphs.prepare(sampler, x, {"y": y}):
        raise RuntimeError(f"{case}: the loop could not be captured")
    times = enough(lambda: graphs(sampler, x, {"y": y}))
    graphs.clear()
    reused = sum(len(stage.layers.reuse) for stage in sampler.stages if stage.layers)
    common = {"dtype": models.dtype(provider), "batch": int(batch)}
    rows.add(case, provider, [t * 500 / int(batch) for t in times], metric="time", unit="s_per_500", **common)
    rows.add(case, provider, [peak_of(device) / 1e9], metric="peak", unit="GB", **common)
    share = 100 * reused / STEPS / len(sublayers(cfg.model.depth))
    rows.add(case, provider, [share], metric="reused", unit="%", **common)


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="H")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--plans", default=",".join(CASES))
    parser.add_argument("--providers", default="ours,ours-fp8")
    parser.add_argument("--cases", default="*", help="patterns of <case>:<provider>, with commas")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many minutes")
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    rows, began = Rows("cached", args.out), time.monotonic()
    rows.ceilings()
    for size in args.sizes.split(","):
        for provider in models.runnable(args.providers.split(",")):
            cfg = models.config(size, provider)
            graphs = GraphSampler(models.model(cfg, provider).eval())
            for plan in args.plans.split(","):
                case = f"{size}:{args.batch}:{plan}"
                wanted = any(fnmatchcase(f"{case}:{provider}", pattern) for pattern in args.cases.split(","))
                if wanted and time.monotonic() - began < args.minutes * 60:
                    bench(rows, case, provider, cfg, graphs)
                    print(rows.write(), flush=True)


if __name__ == "__main__":
    main()
