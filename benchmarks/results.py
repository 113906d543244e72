"""The CSV files of benchmarks/results, read for tables and plots, and the published figures."""

import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import models
from benchmarks.common import RESULTS, read_rows
from uvit_fast import build_model
from uvit_fast.runtime.errors import UserError
from uvit_fast.training.monitor import PEAK_FLOPS, forward_flops

# Appendix: seconds on one A100 for 500 samples of 50 evaluations, without guidance; twice that with it. Batch,
# precision, attention and whether decoding is included are not stated.
SAMPLING_A100 = {"S": 19.0, "M": 34.0, "L": 59.0, "H": 89.0}
# GB of L/2 at batch 128, forward and backward (appendix); MB / 1000 of H/2 (README of the published code), with and
# without memory-efficient attention.
MEMORY_A100 = {
    ("L:128:none", "paper"): 53.0,
    ("L:128:block", "paper"): 10.0,
    ("H:128:none", "paper"): 78.9,
    ("H:128:none", "paper-efficient"): 54.3,
    ("H:128:block", "paper-efficient"): 18.9,
}
# Images/s on one A100 of H/2 at batch 128 under AMP (README of the published code: steps/s x 128).
TRAINING_A100 = {
    "H:128:none": {"plain attention": 0.97 * 128, "memory-efficient attention": 1.14 * 128},
    "H:128:block": {"memory-efficient attention": 0.87 * 128},
}
A100 = PEAK_FLOPS["A100"]
MORE_IS_BETTER = ("images/s", "items/s", "1/s", "TFLOP/s", "of peak", "of 1 GPU")  # units; for others less is
NO_PEERS = ("ours", "paper", "cublas", "calculated")  # first words of our names, of published figures, of limits


class Sampling(NamedTuple):
    """The meaning of a loop's case in sampling.csv: `<S|M|L|H|USiT>:<batch>:<cfg|nocfg>:<latent or its decoder>`."""

    size: str
    batch: int
    guided: bool
    decoded: bool


class Peer(NamedTuple):
    """The best alternative for users; times: how many times better ours is, None if ours was not measured."""

    name: str
    value: float
    times: float | None


class Results:
    """Medians by (question, case, provider, metric); None for what was not measured.

    Of several devices' rows only the last device's count: a ratio of two devices would compare the devices. Of several
    rows of that device for one thing the last counts.

    Args:
        folder: of the CSV files; missing files, and those of other programs, count as empty.

    Raises:
        UserError: there is no such folder.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: str | Path = RESULTS):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            came = "a file" if self.folder.exists() else "none"
            raise UserError(f"{folder}: expected a folder of benchmarks' rows, got {came}")
        self.rows: dict[str, list[dict[str, str]]] = {}
        for path in sorted(self.folder.glob("*.csv")):
            try:
                rows = read_rows(path)
            except UserError:  # another program's
                continue
            dated = sorted(rows, key=lambda row: row["date"])
            last = {(row["case"], row["metric"]): row["device"] for row in dated}
            mine = [row for row in dated if row["device"] == last[row["case"], row["metric"]]]
            newest = {(row["case"], row["provider"], row["metric"]): row for row in mine}
            ids = {id(row) for row in newest.values()}
            self.rows[path.stem] = [row for row in rows if id(row) in ids]

    def value(self, question: str, case: str, provider: str, metric: str) -> float | None:
        for row in self.rows.get(question, []):
            if (row["case"], row["provider"], row["metric"]) == (case, provider, metric):
                return float(row["p50"])
        return None

    def peer(self, question: str, case: str, metric: str, who: str = "ours") -> Peer | None:
        """Return the best peer of a case, and how many times better our `who` is; None if none was measured."""
        rows = [row for row in self.rows.get(question, []) if (row["case"], row["metric"]) == (case, metric)]
        found = [(float(row["p50"]), row["provider"]) for row in rows if not row["provider"].startswith(NO_PEERS)]
        if not found:
            return None
        more, ours = rows[0]["unit"] in MORE_IS_BETTER, self.value(question, case, who, metric)
        value, name = (max if more else min)(found)
        return Peer(name, value, ours and (ours / value if more else value / ours))

    def cases(self, question: str) -> list[str]:
        """Return the cases in the order of the file, without the ceilings."""
        found = (row["case"] for row in self.rows.get(question, []))
        return list(dict.fromkeys(case for case in found if not case.startswith("ceiling:")))

    def providers(self, question: str, first: tuple[str, ...] = ()) -> list[str]:
        """Return the providers of all cases: those of `first` that were measured, then the others."""
        found = {r["provider"]: None for r in self.rows.get(question, []) if not r["case"].startswith("ceiling:")}
        return [p for p in first if p in found] + [p for p in found if p not in first]

    def devices(self, question: str, cases: Collection[str]) -> str:
        """Return the devices that measured these cases."""
        return " / ".join(dict.fromkeys(row["device"] for row in self.rows.get(question, []) if row["case"] in cases))

    def stack(self, question: str) -> str:
        """Return device, versions, dates and commits of a file."""
        keys = ("device", "torch", "triton", "date", "commit")
        seen = [" / ".join(dict.fromkeys(row[key] for row in self.rows[question])) for key in keys]
        return f"{seen[0]}, torch {seen[1]}, triton {seen[2]}, {seen[3]}, commit {seen[4]}"

    def ceiling(self, question: str, which: str) -> float | None:
        """Return FLOP/s of the matrix product ("matmul") or bytes/s of the copy ("copy") of the same run."""
        rows = self.rows.get(question, [])
        return next((float(row["p50"]) * 1e12 for row in rows if row["case"] == f"ceiling:{which}"), None)

    def peak(self, question: str) -> float | None:
        """Return dense bf16 FLOP/s from the data sheet of the measured device."""
        name = self.devices(question, self.cases(question))
        return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)

    def sampling(self) -> dict[str, Sampling]:
        """Return case -> its meaning; cases of another form are left out."""
        found, sizes = {}, models.CONFIGS | models.OTHERS
        for case in self.cases("sampling"):
            parts = case.split(":")
            if len(parts) >= 4 and parts[0] in sizes and parts[1].isdecimal() and parts[2] in ("cfg", "nocfg"):
                found[case] = Sampling(parts[0], int(parts[1]), parts[2] == "cfg", parts[3] != "latent")
        return found

    def extrapolated(self, shown: Iterable[tuple[str, str]]) -> str:
        """Return a sentence about the times among `shown`, (case, provider), that were measured by fewer evaluations
        than the loop's 50; empty if there are none. Where a provider's sizes differ, it names those meant."""
        loops, sizes = self.sampling(), dict[tuple[tuple, str], dict[str, float | None]]()
        for case, who in dict.fromkeys(shown):
            if case in loops and self.value("sampling", case, who, "time") is not None:
                size, *kind = loops[case]
                sizes.setdefault((tuple(kind), who), {})[size] = self.value("sampling", case, who, "nfe_measured")
        counts: dict[tuple[tuple, float], list[str]] = {}
        for (kind, who), found in sizes.items():
            for count in sorted({count for count in found.values() if count is not None and count < 50}):
                mine = [size for size in found if found[size] == count]
                said = who if len(mine) == len(found) else f"{who} of {' '.join(mine)}"
                counts.setdefault((kind, count), []).append(said)
        told = []
        for ((batch, guided, decoded), count), names in sorted(counts.items()):
            how = " guided" * guided + " decoded" * decoded
            told.append(f"batch {batch}{how} from {count:g} ({', '.join(names)})")
        return f"Scaled from fewer than the 50 evaluations: {'; '.join(told)}." if told else ""

    def best(self, size: str, guided: bool, decoded: bool, provider: str) -> tuple[float, int] | None:
        """Return seconds for 500 samples and the batch, for the fastest batch."""
        found = []
        for case, says in self.sampling().items():
            seconds = self.value("sampling", case, provider, "time")
            if (says.size, says.guided, says.decoded) == (size, guided, decoded) and seconds:
                found.append((seconds, says.batch))
        return min(found, default=None)


@functools.cache
def parameters(size: str) -> int:
    """Return how many parameters S, M, L, H or USiT has, with 1001 classes."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(models.config(size, "eager")).parameters())


@functools.cache
def image_flops(size: str) -> float:
    """Return FLOPs of the products of one image's evaluation by S, M, L, H or USiT: 258 tokens, 1001 classes."""
    cfg = models.config(size, "eager")
    with torch.device("meta"):
        flops = forward_flops(build_model(cfg), cfg)
    assert flops, "every op of the reference counts on the meta device"
    return flops


def sampling_flops(size: str, guided: bool) -> float:
    """Return FLOPs of 500 samples of 50 evaluations."""
    return 500 * 50 * image_flops(size) * (2 if guided else 1)
