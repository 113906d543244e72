"""Run the whole suite on this machine, then write the tables and the plots. `uvit-fast bench` or

    python -m benchmarks.suite --quick       # an H100 takes seven minutes
    python -m benchmarks.suite --only sampling,memory --out here

Each benchmark is a process of its own, so that none inherits another's memory, compiled code or clocks. Its duration is
measured too, for the next run on the same device (results/suite.csv).
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import plot
from benchmarks import report as tables
from benchmarks.common import RESULTS, Rows, read_rows
from benchmarks.results import Results
from uvit_fast.commands.arguments import Parser
from uvit_fast.commands.bench import EXAMPLE, arguments
from uvit_fast.runtime.errors import UserError, words
from uvit_fast.runtime.extras import install

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Bench:
    """A module bench_<name>, its arguments, and the seconds that they took or, before a first run, are estimated to
    take on an H100.

    Args:
        cpu: arguments and seconds on a machine without a GPU; None: it needs one.
        gpus: how many it needs at least; it gets the number as --gpus.
    """

    name: str
    full: tuple[str, int]
    quick: tuple[str, int]
    cpu: tuple[str, int] | None = None
    gpus: int = 1


SUITE = [
    Bench("ops", ("", 180), ("--dims 1152", 55)),
    Bench("attention", ("", 90), ("--without compiled", 50)),
    Bench(
        "sampling",
        ("--cases peers,usit", 5400),
        ("--cases *:500:nocfg:latent:* --providers ours,compiled --evaluations 5", 85),
    ),
    Bench("latency", ("--starts 3", 150), ("--sizes S --providers ours", 40)),
    Bench("cached", ("", 150), ("--sizes S --plans outer:3 --providers ours", 9)),
    Bench("training", ("--cases all", 1110), ("--sizes H --providers ours,compiled", 80)),
    Bench("memory", ("", 45), ("", 45)),
    Bench(
        "evaluation",
        ("", 60),
        ("--samples 10000 --reference 2000", 20),
        ("--samples 5000 --reference 1000 --images 32", 60),
    ),
    Bench("data", ("", 60), ("--items 4000 --latents 32 --sizes 256", 15), ("", 60)),
    Bench("scaling", ("", 400), ("--sections scaling --policies block --steps 10", 120), gpus=2),
]  # fmt: skip


@dataclass
class Plan:
    """A planned run: a benchmark, its arguments, its expected seconds."""

    name: str
    arguments: str
    seconds: float


def plan(gpus: int, quick: bool, only: list[str], measured: dict[str, float]) -> tuple[list[Plan], list[str]]:
    """Return what runs on a machine with that many GPUs, and the names of benchmarks that need more and are left out.

    Args:
        only: names; empty: all.
        measured: seconds by `case` of earlier runs on this device.

    Raises:
        UserError: a name that is not in the suite, or none that can run.
    """
    known = [bench.name for bench in SUITE]
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    plans, left_out = [], []
    for bench in SUITE:
        if only and bench.name not in only:
            continue
        how = (bench.quick if quick else bench.full) if gpus >= bench.gpus else bench.cpu
        if how is None:
            left_out.append(bench.name)
        else:
            arguments = how[0] if bench.gpus == 1 else f"--gpus {gpus} {how[0]}".strip()
            plans.append(Plan(bench.name, arguments, measured.get(case(bench.name, arguments), how[1])))
    if left_out and not plans:
        here = [bench.name for bench in SUITE if bench.cpu or gpus >= bench.gpus]
        raise UserError(f"--only {','.join(only)}: needs more GPUs than the {gpus} here; expected of {', '.join(here)}")
    return plans, left_out


def case(name: str, arguments: str) -> str:
    return f"{name} {arguments}".strip()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Time left: of the running plan, what it has beyond the time passed; of the others, their plans, scaled by how
    well earlier plans held.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, plans: list[Plan], now: Callable[[], float] = time.monotonic):
        self.plans, self.now, self.done, self.took, self.began = plans, now, 0, 0.0, now()

    def finish(self) -> float:
        """End the running plan; return its seconds."""
        seconds = self.now() - self.began
        self.took, self.done, self.began = self.took + seconds, self.done + 1, self.now()
        return seconds

    def left(self) -> float:
        planned = sum(plan.seconds for plan in self.plans[: self.done])
        pace = self.took / planned if planned else 1.0
        running, *later = self.plans[self.done :] or [Plan("", "", 0)]
        return max(0.0, running.seconds * pace - (self.now() - self.began)) + pace * sum(p.seconds for p in later)

    def line(self) -> str:
        return f"[{self.done + 1}/{len(self.plans)} {self.plans[self.done].name}, {clock(self.left())} left]"


def run(plans: list[Plan], out: Path, rows: Rows) -> list[str]:
    """Run them one after the other, print their rows as they come, and add their seconds to `rows`; return the names of
    those that failed.
    """
    progress, failed = Progress(plans), []
    for p in plans:
        command = [sys.executable, "-u", "-m", f"benchmarks.bench_{p.name}", *p.arguments.split(), "--out", str(out)]
        print(f"{progress.line()} {' '.join(command[3:])}", flush=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            print(f"{progress.line()} {line}", end="", flush=True)
        code, seconds = process.wait(), progress.finish()
        if code:
            failed.append(p.name)
            print(f"{p.name}: failed with exit code {code} after {clock(seconds)}", flush=True)
        else:
            rows.add(case(p.name, p.arguments), "ours", [seconds], metric="duration", unit="s", dtype="-", batch=1)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="uvit-fast bench", description=__doc__, example=EXAMPLE)
    arguments(parser)
    args = parser.parse_args(argv)
    args.out = (args.out or RESULTS).resolve()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    only = [name for name in args.only.split(",") if name]
    try:
        rows = Rows("suite", args.out)
        known = [row for row in rows.before if row["device"] == (device or "cpu")]
        measured = {row["case"]: float(row["p50"]) for row in known}
        plans, left_out = plan(torch.cuda.device_count(), args.quick, only, measured)
        check(args.out, [p.name for p in plans])
    except (UserError, OSError) as error:
        parser.error(words(error))
    known_here = any(case(p.name, p.arguments) in measured for p in plans)
    total = max(1, round(sum(p.seconds for p in plans) / 60))
    source = "measured here before" if known_here else "estimated" if device is None else "estimated for an H100"
    names = ", ".join(p.name for p in plans) or "nothing"
    print(f"{device or 'no GPU'}: {names}; about {total} min ({source})", flush=True)
    if left_out:
        print(f"left out, for want of GPUs: {', '.join(left_out)}", flush=True)
    failed = run(plans, args.out, rows)
    if rows.rows:
        rows.write()
    report(args.out)
    return int(bool(failed))


def check(out: Path, names: list[str]) -> None:
    """Raise a UserError or OSError if the rows, report or plots would replace files of others.

    Args:
        names: of the benchmarks that will run.
    """
    for path in (out / f"{name}.csv" for name in names):
        if path.exists():
            read_rows(path)
    tables.check(out)
    plot.check(out, {*names, *Results(out).rows})


def report(out: Path) -> None:
    """Write the tables, and the plots if matplotlib is installed."""
    if find_spec("matplotlib"):
        print(f"wrote {len(plot.write(out))} plots")
    else:
        print(f"no plots: {install('plot')}, then python -m benchmarks.plot --results {out}")
    print(f"wrote {tables.write(out)}")


if __name__ == "__main__":
    raise SystemExit(main())
