"""The guide has the roofline of the committed results, the log its verdicts, newest first; all keep to 120 columns."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "kernels.md").read_text()

M, D, L = 33024, 1152, 258
MATRIX, ATTENTION = 2 * M * D * D, 2 * M * L * D  # operations: a product with a weight (D, D); q k^T, or p v
TOKENS, WEIGHT = 2 * M * D, 2 * D * D  # bytes: a tensor (M, D), a weight (D, D)
SHORT = {"forward": "fwd", "backward": "bwd"}
# With `prepare`'s pass over x and the weight before a folded product, and LayerNorm's backward among the gradients.
WORK = {
    ("ln_linear", "forward"): (3 * MATRIX, 5 * TOKENS + 9 * WEIGHT),
    ("ln_linear", "backward"): (6 * MATRIX, 12 * TOKENS + 6 * WEIGHT),
    ("ln_mlp", "forward"): (8 * MATRIX, 12 * TOKENS + 16 * WEIGHT),
    ("ln_mlp", "backward"): (16 * MATRIX, 33 * TOKENS + 16 * WEIGHT),
    ("skip_linear", "forward"): (2 * MATRIX, 3 * TOKENS + 2 * WEIGHT),
    ("skip_linear", "backward"): (4 * MATRIX, 8 * TOKENS + 6 * WEIGHT),
    ("linear_residual", "forward"): (MATRIX, 3 * TOKENS + WEIGHT),
    ("linear_residual", "backward"): (2 * MATRIX, 4 * TOKENS + 2 * WEIGHT),
    ("attention", "forward"): (2 * ATTENTION, 4 * TOKENS),
    ("attention", "backward"): (5 * ATTENTION, 8 * TOKENS),
}


def rows(file: str) -> dict[tuple[str, str], float]:
    """(case, provider) -> the median."""
    with open(ROOT / "benchmarks" / "results" / file) as lines:
        return {(row["case"], row["provider"]): float(row["p50"]) for row in csv.DictReader(lines)}


ROOFLINE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in GUIDE.partition("## Roofline")[2].partition("\n## ")[0].splitlines()
    if re.match(r"\|[^|]+, (forward|backward) \|", line)
]


@pytest.mark.parametrize("line", ROOFLINE, ids=lambda line: line[0])
def test_the_roofline_is_what_the_results_say(line):
    name, gflop, compute, mb, bandwidth, reached, share, cublas, over_eager, over_compiled = line
    op, direction = name.split()[0].rstrip(","), name.split()[-1]
    operations, moved = WORK[op, direction]
    assert (int(gflop), int(mb)) == (round(operations / 1e9), round(moved / 1e6))
    found = rows("attention.csv" if op == "attention" else "ops.csv")
    case = f"{op}:{SHORT[direction]}:1152"
    rate, speed = found["ceiling:matmul", "cublas"], found["ceiling:copy", "torch"]
    assert float(compute) == pytest.approx(float(gflop) / rate, abs=1.5e-3)
    assert float(bandwidth) == pytest.approx(float(mb) / speed / 1e3, abs=1.5e-3)
    assert float(reached) == pytest.approx(found[case, "ours"], abs=6e-4), "docs/kernels.md is older than the results"
    floor = max(float(compute), float(bandwidth))
    assert float(share) == pytest.approx(floor / float(reached), abs=6e-3)
    for cell, provider in ((over_eager, "eager"), (over_compiled, "compiled")):
        if cell != "–":
            assert float(cell) == pytest.approx(float(reached) / found[case, provider], abs=6e-3)
    if cublas != "–":
        assert float(cublas) == pytest.approx(found[case, "cublas"], abs=6e-4)


def test_every_op_of_a_block_is_in_it_both_ways():
    assert [(line[0].split()[0].rstrip(","), line[0].split()[-1]) for line in ROOFLINE] == list(WORK)


def test_it_is_short():
    lines = GUIDE.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


def test_the_log_is_newest_first_with_a_verdict_in_each_heading():
    log = (ROOT / "kernels" / "LOG.md").read_text()
    headings = re.findall(r"^## (.*)$", log, re.MULTILINE)
    dates = [re.fullmatch(r"(\d{4}-\d\d-\d\d) · [^:]+: .+", heading)[1] for heading in headings]
    assert dates == sorted(dates, reverse=True)
    assert max(map(len, log.splitlines())) <= 120


def test_no_line_of_the_kernels_is_long_or_kept_from_the_formatter():
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        lines = file.read_text().splitlines()
        wide = [i for i, line in enumerate(lines, 1) if len(line) > 120]
        assert not wide and "# fmt: " not in file.read_text(), f"{file}: {wide}"
