"""How long do 500 samples of 50 network evaluations take, and a plain call? `python -m benchmarks.bench_sampling`

Cases `<S|M|L|H|USiT>:<batch>:<nocfg|cfg>:<latent|decoded>`, with the published sampler (S: DPM-Solver, USiT: Heun) and,
for cfg, the paper's s = 0.4. Providers: `ours` is the captured loop, `ours-fp8` that with e4m3 products,
`ours-uncaptured` the same without its graph, `ours-sm80` with the kernels of an A100; the peers are those of
`models.py`. All guide in one pass of twice the batch and decode with the same autoencoder, KL-f8 or USiT's DC-f32c32,
with random weights, in bf16. A network whose eps differs from the published one's is not timed.

Metrics: time, s_per_500: loops of the batch scaled to 500 samples; peak, GB (10^9 bytes) allocated, weights included;
nfe_measured, of 50: evaluations that ran in each measured loop. Below 50 the time is extrapolated: the evaluations of a
loop are alike, so its time is scaled to 50 of them. By default batches of at most 8, and ours without guidance, run all
50, the others 5. Decoding is timed by itself and added, except for ours at such small batches, where it is in the
graph. `forward:<S|M|L|H|USiT>:<batch>` is a plain call of the network, model(x, t, y=y) without gradients, as from a
user's own loop; time, ms; up to 50 images, measured with the loop's case. `decode:<batch>` is decoding alone,
ms_per_image.

    --cases peers                all sizes and peers, the most informative first; how long, see below
    --cases essential            captured S, M, L, H at 500, with and without guidance, beside compiled; one image of H
    --cases 'S:*:nocfg:latent:ours' --batches 32,64,125,250 --evaluations 10     which batch is the fastest?
    --cases 'H:*:ours' --missing what matches <case>:<provider> and is not in the file for this commit

Rows are written as they come; `--minutes` ends it in time. `peers` measures for 20 minutes on an H200, by an estimate,
beside what it compiles. `python -m benchmarks.precompile` compiles in parallel before, but for the last eight cases,
which take minutes each. What is fastest of inductor's variants is timed here, alone, all the same: 45 to 60 s for each
of the 16 whole networks of compiled-graphs, 7 to 60 s for each of 12 of torchao-fp8 (measured), another 13 to 28
minutes. `uvit-fast bench` does not precompile: by an estimate it takes an hour and a half.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.autoencoders import dc, kl
from benchmarks.common import RESULTS, Rows, known, measure, need_gpu, select
from uvit_fast.build import build_sampler
from uvit_fast.data.autoencoders import Scaling, decoder
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.model.replayed import Replayed
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.runtime.graphs import Graphs
from uvit_fast.sampling.captured import GraphSampler

SCALE, NULL = 0.4, 1000
AUTOENCODERS, FACTORS = {"kl": kl, "dc": dc}, {"kl": 0.18215, "dc": 0.3189}
SIZES = "HSLM"  # the most informative first
PROVIDERS = ("ours", "ours-fp8", "ours-uncaptured", "ours-sm80", *models.PEERS)
OURS = ("ours", "ours-fp8")
LOOPS = ("eager", "compiled", "torchao-fp8")  # peers for many images at a time
ALONE = ("compiled-graphs", "eager", "compiled")  # and for few
DRAWN = [  # cases whose calls have equally many images, and their peers; the most informative first
    (("500:nocfg:latent", "500:nocfg:decoded"), LOOPS),
    (("1:nocfg:latent", "1:nocfg:decoded"), ALONE),
    (("50:nocfg:latent",), LOOPS),
    (("8:nocfg:latent",), ALONE),
    (("500:cfg:latent", "500:cfg:decoded"), LOOPS[:-1]),
    (("1:cfg:latent", "1:cfg:decoded"), ALONE),
    (("16:nocfg:latent",), ALONE),
]


USIT = [
    (("500:nocfg:latent", "500:nocfg:decoded"), LOOPS[:-1]),
    (("500:cfg:latent",), LOOPS[:-1]),
    (("1:nocfg:latent", "1:nocfg:decoded"), ALONE),
]


def _peers(size: str, drawn: list[tuple[tuple[str, ...], tuple[str, ...]]]) -> list[str]:
    """Return a size's cases in an order in which each network is made once."""
    ours = [f"{size}:{case}:{who}" for who in OURS for cases, _ in drawn for case in cases]
    return ours + [f"{size}:{case}:{who}" for cases, peers in drawn for who in peers for case in cases]


PRESETS = {
    "all": ["*"],
    "peers": [
        *[case for size in SIZES for case in _peers(size, DRAWN)],
        # Float8 compiles for minutes: with guidance before, by precompile; for few images, where it is behind, here.
        *[f"{size}:500:cfg:{what}:torchao-fp8" for size in SIZES for what in ("latent", "decoded")],
        *[f"{size}:{batch}:nocfg:latent:torchao-fp8" for size in SIZES for batch in (8, 1)],
    ],
    "essential": [
        *["H:500:*:latent:ours", "H:1:nocfg:latent:ours", "H:1:nocfg:latent:ours-uncaptured"],
        *["H:1:nocfg:latent:compiled-graphs", "H:500:*:latent:compiled"],
        *[f"{size}:500:*:latent:{provider}" for size in "LMS" for provider in ("ours", "compiled")],
    ],
    "usit": _peers("USiT", USIT),
    "decode": ["decode:*"],
    "sm80": ["H:500:nocfg:latent:ours", "H:500:nocfg:latent:ours-sm80", "H:500:nocfg:latent:eager"],
}
ENOUGH, MOST = 4, 3  # seconds, and loops, after which a case counts as measured
FEW, CALLED = 8, 50  # images: up to which a loop is measured whole, and a plain call is measured


class Case(NamedTuple):
    size: str
    batch: int
    guided: bool
    decoded: bool
    provider: str

    @property
    def captured(self) -> bool:
        """Whether it is our captured loop."""
        return self.provider in (*OURS, "ours-sm80")

    @property
    def network(self) -> tuple[str, str, int]:
        """What a network is made for: ours for any batch, a peer's for one, so that none runs code for several."""
        ours, batch = self.provider.startswith("ours"), self.batch * (2 if self.guided else 1)
        return self.size, self.provider.removesuffix("-uncaptured"), 0 if ours else batch

    @property
    def name(self) -> str:
        return f"{self.size}:{self.batch}:{'cfg' if self.guided else 'nocfg'}:{'decoded' if self.decoded else 'latent'}"


class Bench:
    """Measure cases one after the other; keep the last network, and loops that two cases share.

    Args:
        evaluations: per loop; None: as the module says.
        overrides: of the config, `section.key=value`.
        graphs: what captures; default: CUDA graphs.
    """

    def __init__(
        self,
        device: torch.device,
        evaluations: int | None = None,
        overrides: Iterable[str] = (),
        graphs: Graphs | None = None,
    ):
        self.device, self.evaluations, self.overrides, self.graphs = device, evaluations, [*overrides], graphs
        self.net: tuple[tuple[str, str, int] | None, Any, Any] = (None, None, None)
        self.published: tuple[str | None, Any] = (None, None)
        self.loops: dict[Case, tuple[list[float], float, float]] = {}
        self.decodings: dict[tuple[str, int], tuple[list[float], float]] = {}
        self.vae: tuple[str, Any] = ("", None)  # with the kind of the last one

    def run(self, case: Case) -> tuple[list[float], float, int]:
        """Return seconds for 500 samples, one per measurement; peak bytes; evaluations that ran per loop."""
        whole = case.batch <= FEW or (case.captured and not case.guided)
        count = self.evaluations or (50 if whole else 5)
        together = case.decoded and case.captured and case.batch <= FEW  # the decoder is in the graph
        key = case._replace(decoded=together)
        if key not in self.loops:
            self.loops[key] = self._loop(key, count)
        loop, peak, held = self.loops[key]
        extra = 0.0
        if case.decoded and not together:
            key = (_kind(case.size), case.batch)
            if key not in self.decodings:
                self.decodings[key] = self._decode(case)
            times, memory = self.decodings[key]
            extra, peak = sorted(times)[len(times) // 2], max(peak, held + memory)
        return [(t * 50 / count + extra) * 500 / case.batch for t in loop], peak, count

    def _loop(self, case: Case, count: int) -> tuple[list[float], float, float]:
        """Return seconds of loops of `count` evaluations, peak memory, and how much of it was in use before them."""
        cfg, net = self._network(case)
        sampler = build_sampler(cfg, count)
        x, _, y = models.images(cfg, case.batch, self.device)
        self.vae = ("", None)  # otherwise it would be in the peak of latents
        held = allocated(self.device)
        decode = self._decoder(case.size) if case.decoded else None
        reset_peak(self.device)
        if case.captured:
            graphs = GraphSampler(net, decode, graphs=self.graphs)
            arguments = (sampler, x, {"y": y}, {"y": NULL}, SCALE if case.guided else 0.0)
            if not graphs.prepare(*arguments):
                raise RuntimeError(f"{case.name}: the loop could not be captured")
            times = enough(lambda: graphs(*arguments))
            graphs.clear()
        else:

            def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                t = t.clone(memory_format=torch.contiguous_format)  # expanded, it would cause another compilation
                eps = net(x.contiguous(), t, y=y)  # as is a view of one image, guided
                return eps.clone() if case.provider == "compiled-graphs" else eps  # the next replay overwrites it

            eps_fn = Guidance(call, {"y": y}, {"y": NULL}, SCALE) if case.guided else lambda x, t: call(x, t, y)
            with torch.compiler.set_stance("fail_on_recompile"):  # it would count in the times
                times = enough(torch.no_grad()(lambda: sampler(eps_fn, x)))
        return times, peak_of(self.device), held

    def forward(self, case: Case) -> list[float]:
        """Return milliseconds of plain calls of the network, without gradients."""
        cfg, net = self._network(case)
        x, t, y = models.images(cfg, case.batch, self.device)
        times = measure(torch.no_grad()(lambda: net(x, t, y=y)), repeats=20, warmup=3)
        if isinstance(net, Replayed):
            net.captures.clear()  # their memory would be in the next loop's peak
        return times

    def _network(self, case: Case) -> tuple[Any, torch.nn.Module]:
        """Return the config and network of a case."""
        kind, batch = case.network, case.batch * (2 if case.guided else 1)
        if self.net[0] != kind:
            self.net = (None, None, None)
            gc.collect()
            torch.compiler.reset()
            if self.published[0] != case.size:
                plain = models.config(case.size, "eager", overrides=self.overrides)
                self.published = (case.size, models.Agreement(plain, self.device))
            cfg = models.config(case.size, case.provider, overrides=self.overrides)
            if cfg.sample.sampler == "euler_maruyama":
                cfg = cfg.model_copy(update={"sample": cfg.sample.model_copy(update={"sampler": "dpm_fast"})})
            net, began = models.model(cfg, case.provider, self.device, batch).eval(), time.monotonic()
            with torch.no_grad():
                error = self.published[1].check(net, case.provider, batch)
            took = time.monotonic() - began
            print(
                f"{case.size}, {batch} images, {case.provider}: eps within {error:.1e}, first call {took:.0f} s",
                flush=True,
            )
            self.net = (kind, cfg, net)
        self.net[2].cuda_graphs = not case.provider.endswith("-uncaptured")
        return self.net[1], self.net[2]

    def _decoder(
        self, size: str, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Callable[[Tensor], Tensor]:
        if self.vae[0] != (kind := _kind(size)):
            self.vae = ("", None)  # otherwise both would be in the peaks
            self.vae = (kind, AUTOENCODERS[kind](self.device))
        return decoder(self.vae[1].to(memory_format=memory_format), Scaling(FACTORS[kind]))

    def _decode(self, case: Case) -> tuple[list[float], float]:
        """Return seconds to decode a batch, and the memory that it takes."""
        cfg = models.config(case.size, case.provider, overrides=self.overrides)
        self.vae = ("", None)
        held = allocated(self.device)
        decode, (z, *_) = self._decoder(case.size), models.images(cfg, case.batch, self.device)
        reset_peak(self.device)
        with torch.inference_mode():
            decode(z[:1])
            return enough(lambda: decode(z)), peak_of(self.device) - held

    def decode(self, batch: int) -> dict[str, list[float]]:
        """Return ms per image of decoding alone, by the layout of the autoencoder's weights."""
        z, found = torch.randn(batch, 4, 32, 32, device=self.device), {}
        for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            decode = self._decoder("H", layout)
            with torch.inference_mode():
                decode(z)
                found[name] = [t * 1e3 / batch for t in enough(lambda decode=decode: decode(z))]
        self._decoder("H")
        return found


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(device: torch.device) -> float:
    """Return the bytes in use; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0.0


def peak_of(device: torch.device) -> float:
    """Return the most bytes allocated since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0.0


def _kind(size: str) -> str:
    return "dc" if size in models.OTHERS else "kl"


def enough(run: Callable[[], object]) -> list[float]:
    """Return seconds of a few runs; the first of short ones does not count."""
    times = [measure(run, repeats=1, warmup=0)[0] / 1e3]
    if times[0] < 2:
        times.clear()
    while len(times) < MOST and sum(times) < ENOUGH:
        times += [measure(run, repeats=1, warmup=0)[0] / 1e3]
    return times


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="all", help="presets and patterns, with commas")
    parser.add_argument("--sizes", default=",".join((*SIZES, *models.OTHERS)))
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--batches", default="500,50,16,8,1")
    parser.add_argument("--guidance", default="nocfg,cfg")
    parser.add_argument("--decoding", default="latent,decoded")
    parser.add_argument("--evaluations", type=int, help="of each measured loop; below 50 the time is extrapolated")
    parser.add_argument("--missing", action="store_true", help="only cases that the file lacks for this commit")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many minutes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    patterns = [p for name in args.cases.split(",") for p in PRESETS.get(name, [name])]
    axes = [
        known(parser, "--sizes", args.sizes, (*SIZES, *models.OTHERS)),
        known(parser, "--providers", args.providers, PROVIDERS),
        known(parser, "--decoding", args.decoding, ("latent", "decoded")),
        args.batches.split(","),
        known(parser, "--guidance", args.guidance, ("nocfg", "cfg")),
    ]
    if not all(batch.isdecimal() and int(batch) for batch in axes[3]):
        parser.error(f"--batches: expected numbers of images with commas, got {args.batches!r}")
    need_gpu(parser, args.device)
    rows, began = Rows("sampling", args.out), time.monotonic()
    axes[1] = models.runnable(axes[1], args.device)
    every = [
        Case(size, int(batch), guided == "cfg", decoding == "decoded", provider)
        for size in axes[0]
        for provider in axes[1]
        for decoding in axes[2]
        for batch in axes[3]
        for guided in axes[4]
        if provider != "compiled-graphs" or int(batch) <= models.MOST_IN_GRAPHS
    ]
    decodes = any(fnmatchcase("decode:100", pattern) for pattern in patterns) and "decoded" in axes[2]
    if every and not (decodes or select(patterns, every)):
        parser.error(f"--cases: expected presets ({', '.join(PRESETS)}) or patterns of cases, got {args.cases!r}")
    there = rows.measured() if args.missing else set()
    cases = [case for case in select(patterns, every) if (case.name, case.provider) not in there]
    bench = Bench(torch.device(args.device), args.evaluations, args.set)
    if args.device == "cuda":
        rows.ceilings()
    if decodes:
        for provider, times in bench.decode(100).items():
            rows.add("decode:100", provider, times, metric="time", unit="ms_per_image", dtype="bf16", batch=100)
    failed = []
    while cases and time.monotonic() - began < args.minutes * 60:
        case = cases.pop(0)
        common: dict[str, Any] = {"dtype": models.dtype(case.provider), "batch": case.batch}
        try:
            with models.kernels_of(case.provider):
                times, peak, count = bench.run(case)
                called = case.batch <= CALLED and case.provider != "ours-uncaptured"
                calls = bench.forward(case) if called and not (case.guided or case.decoded) else None
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"{case.name} {case.provider}: not measured: {str(error).splitlines()[0]}", flush=True)
            failed.append(case)
            continue
        rows.add(case.name, case.provider, times, metric="time", unit="s_per_500", **common)
        rows.add(case.name, case.provider, [peak / 1e9], metric="peak", unit="GB", **common)
        rows.add(case.name, case.provider, [float(count)], metric="nfe_measured", unit="of_50", **common)
        if calls:
            rows.add(f"forward:{case.size}:{case.batch}", case.provider, calls, metric="time", unit="ms", **common)
        rows.write()
    if cases:
        print(f"out of time; not measured: {', '.join(f'{case.name}:{case.provider}' for case in cases)}")
    print(rows.write())
    if failed:
        raise SystemExit(f"failed: {', '.join(f'{case.name}:{case.provider}' for case in failed)}")


if __name__ == "__main__":
    main()
