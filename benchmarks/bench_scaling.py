"""How does training scale over the GPUs of one host? `python -m benchmarks.bench_scaling --gpus 2` starts everything
that it measures, with torchrun.

Sections (`--sections`):

scaling   U-ViT-H/2, `--batch` images per GPU: ZeRO 1, 2 and 3 on all GPUs, and ZeRO 2 on each GPU by itself, all at the
          same time, with each of `--policies` of activation checkpointing. Cases:
          `H:<global batch>:zero<stage>:<GPUs>gpu:<policy>`. steps_per_s and img_per_s of `--steps` steps; speedup,
          images/s over those of one GPU, the median of all of them, which may differ by some per cent; over_paper,
          steps_per_s over the paper's at its global batch; peak_gb and static_gb, the largest over the ranks; comm_gb,
          bytes per rank and step in collectives; comm_share, of the step's time in which a collective runs,
          exposed_share, in which nothing else does, and idle_share, in which nothing runs (from a profile of three
          steps, the largest over the ranks); loss_difference, the largest relative one from the first stage's losses
          over all steps. Rows of the provider `calculated` are not measurements: what `--also` GPUs would do, see
          `calculate`.
resume    U-ViT-S/2: steps on all GPUs, stopped in the middle and continued in a new engine: resume_difference, which
must
          be 0; and continued on fewer GPUs with the same global batch: resume_fewer_difference.
sampling  `--samples` images of that network on all GPUs by `uvit-fast sample`, ended half way by a signal and continued
          with --resume: samples_lost and samples_doubled, which must be 0.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import RESULTS, Rows, measure, need_gpu
from benchmarks.communication import Volume, calculate, profiled_shares
from uvit_fast.runtime.errors import in_one_line

ROOT = Path(__file__).parent.parent
LARGE, SMALL = "configs/h2_256.yaml", "configs/s2_cifar10.yaml"
WARMUP, PROFILED, HALF = 4, 3, 10
PAPER_STEPS_PER_S, PAPER_BATCH = 0.668, 1024  # H/2 on 8 A100 (paper, Appendix, Table 2)


class Run:
    """A trainer whose steps are called one by one, on this process's rank.

    Args:
        overrides: of the config.
        folder: of the run.
    """

    def __init__(self, path: str, overrides: list[str], folder: Path):
        from uvit_fast import build_model, load_config
        from uvit_fast.build import build_dataset, build_objective
        from uvit_fast.runtime.processes import start
        from uvit_fast.training.trainer import Trainer

        cfg = load_config(path, ["data.name=synthetic", "data.num_workers=0", "train.log_every=1000", *overrides])
        self.device = start(cfg.device).device
        self.cuda = self.device.type == "cuda"
        self.before = torch.cuda.memory_allocated() if self.cuda else 0
        with torch.device(self.device):
            net = build_model(cfg)
        self.trainer = Trainer(cfg, net, build_objective(cfg), build_dataset(cfg), folder)
        self.stream = self.trainer.stream()

    def step(self) -> None:
        self.trainer._step(self.stream)

    def losses(self) -> list[float]:
        """Return the losses of all steps so far, over all ranks."""
        sums = self.trainer.rows.row.over_ranks(self.trainer.step)
        return (sums[0] / sums[1]).tolist()


def speed(stage: int, policy: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Worker: measure time, memory, communication and losses of one ZeRO stage and one checkpointing policy."""
    gpus = int(os.environ["WORLD_SIZE"])
    steps = WARMUP + args.steps + PROFILED + 1
    overrides = [f"train.batch_size={args.batch * gpus}", f"train.iterations={steps}", f"train.zero_stage={stage}"]
    overrides.append(f"model.activation_checkpointing={policy}")
    run = Run(LARGE, [f"device={args.device}", *overrides, "train.warmup_steps=20", *args.set], folder)
    result: dict[str, Any] = {"gpus": gpus, "stage": stage, "policy": policy}
    if run.cuda:
        run.trainer.engine.moments()
        result["static_gb"] = (torch.cuda.memory_allocated() - run.before) / 1e9
        torch.cuda.reset_peak_memory_stats()  # the first step captures, unlike later ones
    for _ in range(WARMUP):
        run.step()
    if run.cuda:
        torch.cuda.synchronize()
    result["times"] = measure(run.step, args.steps, 0)
    if run.cuda:
        result["peak_gb"] = (torch.cuda.max_memory_allocated() - run.before) / 1e9
    with Volume() as volume:
        run.step()
    result["comm_bytes"] = volume.bytes
    if run.cuda and gpus > 1:
        result |= profiled_shares(run.step, PROFILED)
    result["losses"] = run.losses()
    return result


def resumed(args: argparse.Namespace, folder: Path, parts: list[tuple[str, int]]) -> list[list[float]]:
    """Worker: for each (run, steps), train or continue that run to those steps, save, and return this call's losses."""
    found = []
    for name, steps in parts:
        if name in ("continued", "fewer") and os.environ["RANK"] == "0":
            shutil.copytree(folder / "halves", folder / name)
        overrides = [
            f"device={args.device}",
            "train.batch_size=128",
            f"train.micro_batch_size={128 // args.gpus}",
            *args.set,
        ]
        run = Run(SMALL, [*overrides, f"train.iterations={steps}", "train.warmup_steps=2"], folder / name)
        while run.trainer.step < steps:
            run.step()
        run.trainer._save()
        assert run.trainer.saves.finish()
        run.trainer.saves.close()
        found.append(run.losses())
        dist.barrier(device_ids=[run.trainer.world.local_rank] if run.cuda else None)
    return found


def worker(args: argparse.Namespace) -> None:
    """Run a rank that torchrun started: `--worker` is a list of (what, its argument), the answers go to a file."""
    rank, answers = int(os.environ["RANK"]), []
    for number, (what, argument) in enumerate(json.loads(args.worker)):
        folder = Path(args.folder)
        began = time.monotonic()
        if what == "speed":
            answer = [None] * int(os.environ["WORLD_SIZE"])
            mine = speed(*argument, args, folder / f"speed_{os.environ['WORLD_SIZE']}_{number}")
            dist.all_gather_object(answer, mine)
        else:
            answer = resumed(args, folder, argument)
        gc.collect()  # the engine, of which there is one at a time
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if rank == 0:
            print(f"{what} {argument}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        answers.append(answer)
    if rank == 0:
        (Path(args.folder) / "answers.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def torchrun(gpus: int, module: str, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    return [*launcher, "-m", "--", module, *arguments]


def ask(gpus: int, args: argparse.Namespace, folder: Path, tasks: list[tuple[str, Any]], first: int = 0) -> list[Any]:
    """Return the answers of workers on `gpus` GPUs, the first of which is number `first`."""
    passed = [part for setting in args.set for part in ("--set", setting)]
    passed += [
        "--batch",
        str(args.batch),
        "--steps",
        str(args.steps),
        "--device",
        args.device,
        "--gpus",
        str(args.gpus),
    ]
    passed += ["--folder", str(folder), "--worker", json.dumps(tasks)]
    env = environment()
    if args.device == "cuda":
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + gpus])
    subprocess.run(torchrun(gpus, "benchmarks.bench_scaling", *passed), check=True, env=env)
    return json.loads((folder / "answers.json").read_text())


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}


def scaling(rows: Rows, args: argparse.Namespace, answers: list[list[dict]], each: list[dict]) -> list[str]:
    """Return the rows of one policy in the scaling section, and what is wrong.

    Args:
        answers: by stage, of all ranks. each: of every GPU by itself.
    """
    wrong, dtype = [], "bf16" if args.device == "cuda" else "fp32"
    one = each[0] | {"times": [time for e in each for time in e["times"]]}
    alone = sorted(one["times"])[len(one["times"]) // 2]
    first = answers[0][0]["losses"]
    for ranks in [[one], *answers]:
        r, gpus = ranks[0], ranks[0]["gpus"]

        def add(metric: str, values: list[float], unit: str, r=r, gpus=gpus, provider: str = "ours") -> None:
            case = f"H:{args.batch * gpus}:zero{r['stage']}:{gpus}gpu:{r['policy']}"
            rows.add(case, provider, values, metric=metric, unit=unit, dtype=dtype, batch=args.batch * gpus)

        add("steps_per_s", [1e3 / t for t in r["times"]], "1/s")
        if args.batch * gpus == PAPER_BATCH:
            add("over_paper", [1e3 / t / PAPER_STEPS_PER_S for t in r["times"]], "of 8 A100")
        add("img_per_s", [args.batch * gpus * 1e3 / t for t in r["times"]], "images/s")
        step = sorted(r["times"])[len(r["times"]) // 2]
        if gpus > 1:
            add("speedup", [gpus * alone / step], "of 1 GPU")
            add("comm_gb", [sum(r["comm_bytes"].values()) / 1e9], "GB")
            difference = max(abs(a - b) / abs(b) for a, b in zip(r["losses"], first))
            add("loss_difference", [difference], "relative")
            if not all(abs(loss) < float("inf") for loss in r["losses"]) or difference > 0.01:
                wrong.append(
                    f"ZeRO {r['stage']} on {gpus}: losses not finite, or {difference:.2g} from "
                    f"ZeRO {answers[0][0]['stage']}'s"
                )
        for name in ("peak_gb", "static_gb"):
            if name in r:
                add(name, [max(rank[name] for rank in ranks)], "GB")
        if "comm_share" not in r:
            continue
        for name in ("comm_share", "exposed_share", "idle_share"):
            add(name, [max(rank[name] for rank in ranks)], "of step")
        for more in (int(n) for n in args.also.split(",") if int(n) > gpus):
            then = calculate(more, gpus, alone, step, max(rank["exposed_share"] for rank in ranks))
            add("speedup", [more * alone / then], "of 1 GPU", gpus=more, provider="calculated")
            add("steps_per_s", [1e3 / then], "1/s", gpus=more, provider="calculated")
            if args.batch * more == PAPER_BATCH:
                add("over_paper", [1e3 / then / PAPER_STEPS_PER_S], "of 8 A100", gpus=more, provider="calculated")
    return wrong


def resume(rows: Rows, args: argparse.Namespace, all_gpus: list[list[float]], fewer: list[list[float]]) -> list[str]:
    """Return the rows of the resume section, and what is wrong."""
    straight, _, continued = all_gpus
    wrong = []
    for metric, losses, limit in (("resume_difference", continued, 0.0), ("resume_fewer_difference", fewer[0], 0.01)):
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses, straight[HALF:]))
        dtype = "bf16" if args.device == "cuda" else "fp32"
        rows.add(f"S:128:{args.gpus}gpu", "ours", [difference], metric=metric, unit="relative", dtype=dtype, batch=128)
        if len(losses) != HALF or not difference <= limit:
            wrong.append(f"{metric}: {difference:.3g} over {len(losses)} steps, expected at most {limit} over {HALF}")
    return wrong


def sampling(rows: Rows, args: argparse.Namespace, folder: Path) -> list[str]:
    """Sample, stop half way, continue, count."""
    weights = folder / "straight" / "checkpoints" / f"step_{2 * HALF:08d}" / "ema.safetensors"
    out = folder / "samples.npz"
    settings = ["sample.sampler=dpm_fast", f"sample.steps={args.evaluations}", f"device={args.device}", *args.set]
    command = ["sample", "--config", SMALL, "--checkpoint", str(weights), "--out", str(out), "--num", str(args.samples)]
    command += ["--batch", str(args.sample_batch), *(part for setting in settings for part in ("--set", setting))]
    parts, every = out.with_name(out.name + ".parts"), -(-args.samples // args.sample_batch)

    quiet = {"stderr": subprocess.DEVNULL}  # torchrun's report of the signal
    process = subprocess.Popen(torchrun(args.gpus, "uvit_fast.cli", *command), env=environment(), **quiet)
    while process.poll() is None and len([*parts.glob("[0-9]*.npy")]) < every // 2:
        time.sleep(0.02)
    process.terminate()  # torchrun ends its ranks
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.npy")}
    began = time.monotonic()
    again = subprocess.Popen(torchrun(args.gpus, "uvit_fast.cli", *command, "--resume"), env=environment())
    redrawn = set()
    while again.poll() is None:
        redrawn |= {name for name, when in there.items() if _changed(parts / name, when)}
        time.sleep(0.2)
    if again.returncode:
        return [f"sampling: --resume ended with {again.returncode}"]
    lost, doubled = count(out, args.samples)
    common = {"dtype": "bf16" if args.device == "cuda" else "fp32", "batch": args.sample_batch}
    case = f"sample:{args.samples}:{args.gpus}gpu"
    rows.add(case, "ours", [len(there)], metric="parts_before_the_end", unit=f"of {every}", **common)
    rows.add(case, "ours", [lost], metric="samples_lost", unit="images", **common)
    rows.add(case, "ours", [doubled], metric="samples_doubled", unit="images", **common)
    left = args.samples * (1 - len(there) / every)
    rows.add(
        case, "ours", [left / (time.monotonic() - began)], metric="img_per_s_with_start", unit="images/s", **common
    )
    if lost or doubled or redrawn or not 0 < len(there) < every:
        return [
            f"sampling: {lost} lost, {doubled} doubled, {len(redrawn)} parts drawn twice, "
            f"{len(there)} of {every} before its end"
        ]
    return []


def _changed(path: Path, when: int) -> bool:
    try:
        return path.stat().st_mtime_ns != when
    except FileNotFoundError:  # collected
        return False


def count(path: Path, wanted: int) -> tuple[int, int]:
    """Return (missing images, images that are there more than once) of an .npz."""
    import numpy as np

    with np.load(path) as file:
        seen = [hashlib.sha256(image.tobytes()).digest() for image in file["arr_0"]]
    return wanted - len(seen), len(seen) - len(set(seen))


def run_all(args: argparse.Namespace) -> int:
    rows, wrong, sections = Rows("scaling", args.out), [], args.sections.split(",")
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        stages, policies = args.stages.split(","), args.policies.split(",")
        if "scaling" not in sections:
            policies = []
        tasks: list[tuple[str, Any]] = [("speed", (int(stage), p)) for p in policies for stage in stages]
        if "resume" in sections or "sampling" in sections:
            tasks.append(("resume", [("straight", 2 * HALF), ("halves", HALF), ("continued", 2 * HALF)]))
        answers = ask(args.gpus, args, folder, tasks)
        lone: list[tuple[str, Any]] = [("speed", (2, p)) for p in policies]
        if "resume" in sections:
            lone.append(("resume", [("fewer", 2 * HALF)]))
        others = range(1, args.gpus) if policies and args.device == "cuda" else []
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(ask, 1, args, folder, lone)] if lone else []
            jobs += [pool.submit(ask, 1, args, folder / f"gpu{i}", lone[: len(policies)], i) for i in others]
        alone = [job.result() for job in jobs]
        for i in range(len(policies)):
            wrong += scaling(rows, args, answers[i * len(stages) : (i + 1) * len(stages)], [a[i][0] for a in alone])
            rows.write()
        if "resume" in sections:
            wrong += resume(rows, args, answers[-1], alone[0][-1])
            rows.write()
        if "sampling" in sections:
            wrong += sampling(rows, args, folder)
    print("\n".join([str(rows.write()), *wrong]))
    return int(bool(wrong))


@in_one_line()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--sections", default="scaling,resume,sampling")
    parser.add_argument("--stages", default="1,2,3", help="of ZeRO")
    parser.add_argument("--policies", default="block,none", help="of activation checkpointing")
    parser.add_argument("--batch", type=int, default=128, help="images per GPU and step")
    parser.add_argument("--steps", type=int, default=26, help="timed steps, after four untimed ones")
    parser.add_argument("--also", default="4,8", help="numbers of GPUs to calculate")
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--sample-batch", type=int, default=250)
    parser.add_argument("--evaluations", type=int, default=50, help="network evaluations per sample")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument(
        "--scratch", help="folder for checkpoints and samples; default: the system's for temporary files"
    )
    parser.add_argument("--out", default=RESULTS, help="folder of scaling.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(args)
        return 0
    need_gpu(parser, args.device)
    os.chdir(ROOT)
    return run_all(args)


if __name__ == "__main__":
    raise SystemExit(main())
