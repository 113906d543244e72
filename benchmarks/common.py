"""Shared by all benchmarks: the CSV schema, event timing, and the machine's own ceilings, measured in the same run."""

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import read_table, write_table

COLUMNS = "date,commit,device,torch,triton,question,case,provider,dtype,batch,metric,unit,p20,p50,p80".split(",")
RESULTS = Path(__file__).parent / "results"


def report_folder(results: str | Path) -> Path:
    """Return where the report on a folder of rows goes: beside the committed ones, else among the rows."""
    return RESULTS.parent if Path(results).resolve() == RESULTS.resolve() else Path(results)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return a file's rows.

    Raises:
        UserError: it is not a file of a benchmark's rows.
    """
    return read_table(path, COLUMNS, "uvit-fast bench", lambda row: [*map(float, _spread(row))], empty=True)


def _spread(row: dict[str, str]) -> list[str]:
    return [row[name] for name in ("p20", "p50", "p80")]


def between(page: Path, first: str, last: str, new: str) -> str:
    """Return a page's text with `new` in place of what stands between two of its lines."""
    before, rest = page.read_text().split(first)
    return f"{before}{first}\n\n{new}\n\n{last}{rest.partition(last)[2]}"


def need_gpu(parser: argparse.ArgumentParser, device: str = "cuda") -> None:
    """End a GPU benchmark in one line if there is no GPU."""
    if device != "cpu" and not torch.cuda.is_available():
        other = "" if parser.get_default("device") is None else "; --device cpu tries the code, not the speed"
        parser.error(f"expected a GPU, got none{other}")


def known(parser: argparse.ArgumentParser, option: str, text: str, names: Iterable[str]) -> list[str]:
    """Return the names of a comma-separated list; one that is not among `names` ends the benchmark in one line."""
    names, given = list(names), text.split(",")
    if unknown := [name for name in given if name not in names]:
        parser.error(f"{option}: expected some of {','.join(names)}, got {unknown[0]!r}")
    return given


def select(patterns: Iterable[str], every: Iterable[Any]) -> list[Any]:
    """Return the cases whose `<name>:<provider>` matches some pattern, in the patterns' order, each once."""
    found = [case for pattern in patterns for case in every if fnmatchcase(f"{case.name}:{case.provider}", pattern)]
    return list(dict.fromkeys(found))


class Rows:
    """The rows of one question, one per case, provider and metric, printed as they come and written as
    results/<question>.csv.

    The file's rows of other cases stay, each with its own date and commit; only another GPU's rows go.

    Args:
        question: the file's name; what the benchmark asks.
        folder: where the file goes; made if it is missing.

    Attributes:
        rows: of this run.
        before: of earlier runs, on this GPU or a CPU.

    Raises:
        UserError, OSError: such a file is there, but not of a benchmark's rows; or none could be written.
    """

    def __init__(self, question: str, folder: str | Path = RESULTS):
        self.question, self.path, self.rows = question, Path(folder) / f"{question}.csv", []
        import triton

        self.common = {
            "date": date.today().isoformat(),
            "commit": _commit(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "question": question,
        }
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)  # or all would be measured for nothing
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: expected a folder that can be written to")
        there = read_rows(self.path) if self.path.exists() else []
        self.before = [row for row in there if self._may_stand_beside(row["device"])]

    def _may_stand_beside(self, device: str) -> bool:
        return "cpu" in (device, self.common["device"]) or device == self.common["device"]

    def add(
        self, case: str, provider: str, values: list[float], *, metric: str, unit: str, dtype: str, batch: int
    ) -> float:
        """Add one row from repeated measurements; return their median.

        Args:
            provider: ours, one of `models.PEERS`, or the name of another package.
        """
        p20, p50, p80 = quantiles(values)
        row = {"case": case, "provider": provider, "dtype": dtype, "batch": batch, "metric": metric, "unit": unit}
        self.rows.append({**self.common, **row, "p20": f"{p20:.6g}", "p50": f"{p50:.6g}", "p80": f"{p80:.6g}"})
        print(f"{case:32s} {provider:15s} {p50:12.5g} {unit}", flush=True)
        return p50

    def measured(self) -> set[tuple[str, str]]:
        """Return case and provider of the earlier rows that were measured on this device at this commit."""
        now = self.common["device"], self.common["commit"]
        return {(row["case"], row["provider"]) for row in self.before if (row["device"], row["commit"]) == now}

    def write(self) -> Path:
        """Write the file whole: the rows not measured again, and this run's."""
        measured = {_what(row) for row in self.rows}
        kept = [row for row in self.before if _what(row) not in measured]
        write_table(self.path, COLUMNS, [*kept, *self.rows])
        return self.path

    def ceilings(self) -> None:
        """Add this card's rates, for every file: a bf16 matrix product of 8192 (TFLOP/s) and a copy (TB/s)."""
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = measure(lambda: a @ b)
        self.add(
            "ceiling:matmul",
            "cublas",
            [2 * 8192**3 / t / 1e9 for t in times],
            metric="rate",
            unit="TFLOP/s",
            dtype="bf16",
            batch=1,
        )
        source = torch.randn(2**30, device="cuda")
        target = torch.empty_like(source)
        times = measure(lambda: target.copy_(source))
        self.add(
            "ceiling:copy",
            "torch",
            [2 * 4 * 2**30 / t / 1e9 for t in times],
            metric="rate",
            unit="TB/s",
            dtype="fp32",
            batch=1,
        )


def _what(row: dict[str, str]) -> tuple[str, ...]:
    return row["device"], row["case"], row["provider"], row["metric"]


def measure(f: Callable[[], object], repeats: int = 25, warmup: int = 5) -> list[float]:
    """Return milliseconds of `repeats` calls, by CUDA events on a GPU, by the wall clock elsewhere."""
    for _ in range(warmup):
        f()
    if not torch.cuda.is_available():
        return [1e3 * t for t in seconds(f, repeats)]
    torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def seconds(f: Callable[[], object], repeats: int) -> list[float]:
    """Return wall-clock seconds of calls that end with the device's work, such as those that return numbers."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile; of a single value, three times that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _commit() -> str:
    """Return the measured commit, from COMMIT or from git, with a plus if files differ from it."""
    if "COMMIT" in os.environ:  # for files copied to another machine
        return os.environ["COMMIT"]
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    if done.returncode == 0:
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True
        ).stdout
        return done.stdout.strip() + ("+" if dirty.strip() else "")
    return "unknown"
