"""How fast is a whole training step, and how much memory does it hold? `python -m benchmarks.bench_training`

Cases `<S|M|L|H|USiT>:<batch>:<none|block|selective>` on 32 x 32 x 4 latents (USiT: 16 x 16 x 32): forward, backward,
AdamW and EMA. Providers: `ours` is the trainer's own step with its DeepSpeed engine, bf16 weights with fp32 masters,
forward and backward captured; `ours-uncaptured` the same launched from Python; `ours-sm80` with the kernels of an A100.
The peers, `eager`, `compiled` and `torchao-fp8`, are those of `models.py` with PyTorch's fused AdamW and an EMA, all on
the bf16 weights: without masters, which is less work than ours and unfit for long training. `selective` gives ours the
budget of `BUDGET`, and the peers what every block keeps without one. A network whose eps differs from the published
one's is not timed. `ours-out_blocks` and `ours-label_emb` fine-tune H: the upper half with the last layers and the
labels, or the labels alone (`train.trainable`), with the rest frozen.

Metrics: img_per_s; mfu and tflops of the matrix products, recomputed ones not counted; peak_gb, the most that was
allocated, also in the step that captures; reserved_gb, what the allocator held of the device; static_gb: weights,
optimizer, EMA, without gradients; activation_gb, peak_gb without static_gb, to which the budget applies (or the
optimizer's own 4 bytes per parameter, if blocks keep less), expected_activation_gb and budget_gb. GB are 10^9 bytes. A
CPU has no memory metrics.

    --cases all --missing --minutes 9     what is not in the file for this commit; run benchmarks.precompile first
    --cases uncaptured                    steps bound by the host, in which Python's launches count: H at 16, S at 128
    --cases 'H:*:ours'                    what matches <case>:<provider>
"""

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import models
from benchmarks.common import RESULTS, Rows, known, measure, need_gpu, select
from uvit_fast import build_model
from uvit_fast.build import build_dataset, build_objective
from uvit_fast.config import Config
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.training import activations
from uvit_fast.training.captured import Captured
from uvit_fast.training.monitor import forward_flops, utilisation
from uvit_fast.training.trainer import Trainer

PROVIDERS = ("ours", "ours-uncaptured", "ours-sm80", "eager", "compiled", "torchao-fp8")
STEPPED = ("ours", "compiled", "torchao-fp8", "eager")
MAIN = [f"{size}:128:{policy}:{who}" for size in (*"HSLM", "USiT") for who in STEPPED for policy in ("none", "block")]
UNCAPTURED = [
    f"{case}:none:{who}" for case in ("H:16", "S:128") for who in ("ours-uncaptured", "eager", "compiled", "ours")
]
EVERY = [
    f"{size}:128:{policy}:{who}" for size in "HSLM" for who in PROVIDERS for policy in ("none", "block", "selective")
]
EVERY += [f"H:128:{policy}:{who}" for who in models.FROZEN for policy in ("none", "block")]
EVERY = [case for case in EVERY if not case.endswith("selective:torchao-fp8")]  # it does not recognise float8 products
EVERY = list(dict.fromkeys([*EVERY, *MAIN, *UNCAPTURED]))
PRESETS = {"main": MAIN, "all": EVERY, "uncaptured": UNCAPTURED}
BUDGET = {
    "S": 1.5,
    "M": 5.0,
    "L": 14.8,
    "H": 12.0,
    "USiT": 12.0,
}  # GB for 128 images; L: 20 GB with weights and optimizer
STEPS, WARMUP = 9, 3


class Case(NamedTuple):
    size: str
    batch: int
    policy: str
    provider: str

    @property
    def name(self) -> str:
        return f"{self.size}:{self.batch}:{self.policy}"


def config(size: str, provider: str, batch: int, device: str, overrides: list[str]) -> Config:
    how = ["auto", "auto"] if provider.startswith("ours") else ["reference", "sdpa"]
    settings = [f"model.kernels={how[0]}", f"model.attention={how[1]}", "data.name=synthetic", "data.num_workers=0"]
    settings += [f"train.cuda_graphs={provider != 'ours-uncaptured'}"]
    settings += [f"device={device}", f"train.batch_size={batch}", "train.iterations=1000"]
    settings += [
        "train.log_every=1000",
        "train.spike_deviations=0",
        f"train.trainable={models.FROZEN.get(provider, '[all]')}",
    ]
    return models.load(size, [*settings, *overrides])


class Ours:
    """The trainer's step. One engine serves all policies: only what the blocks keep differs."""

    def __init__(self, cfg: Config, device: torch.device):
        with torch.device(device):  # initialised there, which saves seconds
            self.net = build_model(cfg)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.costs = activations.inspect(self.net, cfg.model, cfg.train.batch_size, device, dtype)
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = Trainer(cfg, self.net, build_objective(cfg), build_dataset(cfg), Path(self.folder.name))
        self.stream = self.trainer.stream()

    def keep(self, policy: str, budget: float) -> float | None:
        """Set what blocks keep; return the predicted peak of the activations in bytes."""
        plan = [policy] * len(self.net.blocks)
        if policy == "selective":
            plan = activations.plan_within(budget, self.costs)
            print(activations.describe(plan, self.costs, budget))
        for block, each in zip(self.net.blocks, plan):
            block.checkpointing = each
        if isinstance(self.net.forward, Captured):
            self.net.forward.forget()
        return self.costs.peak(plan)

    def settle(self) -> None:
        """Create the optimizer's state."""
        self.trainer.engine.moments()

    def step(self) -> None:
        self.trainer._step(self.stream)

    def close(self) -> None:
        """Release the device's memory."""
        self.trainer.engine.close()


class Peer:
    """The published network's step as its users run it today."""

    def __init__(self, cfg: Config, device: torch.device, provider: str):
        train, batch = cfg.train, cfg.train.batch_size
        agreement = models.Agreement(cfg, device)
        self.net = models.model(cfg, provider, device, batch, training=True)
        print(f"{provider}: eps within {agreement.check(self.net, provider, batch):.1e}", flush=True)
        self.weights = list(self.net.parameters())
        rate = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
        self.adamw = torch.optim.AdamW(self.weights, fused=True, **rate)
        self.ema = [p.detach().clone() for p in self.weights]
        self.loss = models.loss(cfg, batch, device)

    def keep(self, policy: str, budget: float) -> None:
        for block in self.net.blocks:
            block.checkpointing = policy

    def settle(self) -> None:
        """Compile, and create the optimizer's state."""
        self.step()

    def step(self) -> None:
        self.loss(self.net).backward()
        self.adamw.step()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.weights], 1e-4)
        self.adamw.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Do nothing: only compiled code outlives it."""
        torch.compiler.reset()


def rows_of(rows: Rows, cases: list[Case], args: argparse.Namespace, late: Callable[[Case], bool]) -> None:
    """Add the rows of one network, with one engine or optimizer for all policies."""
    size, batch, _, provider = cases[0]
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    cfg = config(size, provider, batch, args.device, args.set)
    with torch.device("meta"):
        flops = forward_flops(build_model(cfg), cfg)
    before = torch.cuda.memory_allocated() if cuda else 0
    subject = Ours(cfg, device) if provider.startswith("ours") else Peer(cfg, device, provider)
    with contextlib.closing(subject):
        for case in cases:
            if late(case):
                return
            budget = BUDGET[size] * 1e9 * batch / 128 if args.budget is None else args.budget * 1e9
            expected = subject.keep(case.policy, budget)
            subject.settle()
            if cuda:
                torch.cuda.synchronize()
                gc.collect()
                torch.cuda.empty_cache()
                static = torch.cuda.memory_allocated() - before
                torch.cuda.reset_peak_memory_stats()
            times = measure(subject.step, STEPS, WARMUP)
            common = {"dtype": models.dtype(provider) if cuda else "fp32", "batch": batch}

            def add(metric: str, values: list[float], unit: str, case=case, common=common) -> None:
                rows.add(case.name, provider, values, metric=metric, unit=unit, **common)

            speeds = [batch / t * 1e3 for t in times]
            add("img_per_s", speeds, "images/s")
            if cuda and provider not in models.FROZEN:  # their steps have fewer products
                used = [utilisation(speed, flops, device, 1) for speed in speeds]
                add("tflops", [u["tflops_per_gpu"] for u in used], "TFLOP/s")
                if "mfu" in used[0]:
                    add("mfu", [u["mfu"] for u in used], "of peak")
            if cuda:
                peak = torch.cuda.max_memory_allocated() - before
                add("peak_gb", [peak / 1e9], "GB")
                add("reserved_gb", [torch.cuda.max_memory_reserved() / 1e9], "GB")
                add("static_gb", [static / 1e9], "GB")
                add("activation_gb", [(peak - static) / 1e9], "GB")
            if expected and provider not in models.FROZEN:
                add("expected_activation_gb", [expected / 1e9], "GB")
                if case.policy == "selective":
                    add("budget_gb", [budget / 1e9], "GB")
            rows.write()


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="main", help=f"{', '.join(PRESETS)}, and patterns, with commas")
    parser.add_argument("--sizes", default="H,S,L,M,USiT", help="of those cases, the ones of these sizes")
    parser.add_argument("--providers", default=",".join((*PROVIDERS, *models.FROZEN)), help="and of these")
    parser.add_argument("--missing", action="store_true", help="only cases that the file lacks for this commit")
    parser.add_argument("--batch", type=int, help="default: each case's own")
    parser.add_argument("--budget", type=float, help="GB for activations in selective cases; default: by size")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many minutes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--out", default=RESULTS, help="folder of training.csv")
    args = parser.parse_args()
    every = [Case(size, int(batch), *rest) for size, batch, *rest in (case.split(":") for case in EVERY)]
    patterns = [p for name in args.cases.replace(",", " ").split() for p in PRESETS.get(name, [name])]
    if unknown := [pattern for pattern in patterns if not select([pattern], every)]:
        parser.error(f"--cases: expected {', '.join(PRESETS)} or patterns of {EVERY[0]} and such, got {unknown[0]!r}")
    sizes = known(parser, "--sizes", args.sizes, models.CONFIGS | models.OTHERS)
    providers = known(parser, "--providers", args.providers, (*PROVIDERS, *models.FROZEN))
    need_gpu(parser, args.device)
    rows, began, left_out, failed = Rows("training", args.out), time.monotonic(), [], []
    providers = models.runnable(providers, args.device)
    asked = [case for case in select(patterns, every) if case.size in sizes and case.provider in providers]
    asked = list(dict.fromkeys(case._replace(batch=args.batch or case.batch) for case in asked))
    if args.missing:
        there = rows.measured()
        asked = [case for case in asked if (case.name, case.provider) not in there]

    def late(case: Case) -> bool:
        if time.monotonic() - began > args.minutes * 60:
            left_out.append(f"{case.name}:{case.provider}")
        return bool(left_out)

    if args.device == "cuda":
        rows.ceilings()
    networks: dict[tuple[str, int, str], list[Case]] = {}
    for case in asked:
        networks.setdefault((case.size, case.batch, case.provider), []).append(case)
    for (size, batch, provider), cases in networks.items():
        what = f"{size}:{batch}:{provider}"
        try:
            with models.kernels_of(provider):
                rows_of(rows, cases, args, late)
        except torch.OutOfMemoryError as error:  # also a result: there is no row of it
            print(f"{what}: out of memory: {error}".split("\n")[0], flush=True)
        except RuntimeError as error:
            print(f"{what}: not measured: {error}".split("\n")[0], flush=True)
            failed.append(what)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(rows.write(), f"left out for time, from: {left_out[0]}" if left_out else "")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
