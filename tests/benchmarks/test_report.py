"""The report says what the CSV files say, and only that."""

import csv

import pytest

from benchmarks import plot, report
from benchmarks.common import COLUMNS
from benchmarks.results import Results, image_flops


def results(folder, question, *rows, device="NVIDIA H100 80GB HBM3"):
    """A CSV file of rows (case, provider, metric, median), with ceilings."""
    common = {
        "date": "2026-01-01",
        "commit": "abc",
        "device": device,
        "torch": "2",
        "triton": "3",
        "question": question,
    }
    ceilings = [("ceiling:matmul", "cublas", "rate", 800.0), ("ceiling:copy", "torch", "rate", 3.0)]
    folder.mkdir(exist_ok=True)
    with open(folder / f"{question}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="0")
        writer.writeheader()
        for case, provider, metric, value in [*ceilings, *rows]:
            row = {"case": case, "provider": provider, "metric": metric, "unit": "", "p50": value}
            writer.writerow(common | row)
    return Results(folder)


def cells(text, first):
    """The cells of the table row that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_report_is_what_the_committed_results_say():
    found = Results()
    wanted = report.text(found, report.HERE)
    assert (report.HERE / report.REPORT).read_text() == wanted, "run `make report`"


def test_what_was_not_measured_is_said(tmp_path):
    text = report.text(Results(tmp_path), tmp_path)
    for question in ("sampling", "training", "memory", "ops", "attention", "scaling", "data", "evaluation"):
        assert f"Not measured: `python -m benchmarks.bench_{question}`." in text
    assert "| S," not in text and "![" not in text


def test_an_a100_is_estimated_at_the_same_mfu_and_the_best_batch_counts(tmp_path):
    rows = [
        ("H:50:nocfg:latent", "ours", "time", 14.0),
        ("H:500:nocfg:latent", "ours", "time", 12.0),
        ("H:500:nocfg:latent", "ours", "peak", 9.0),
        ("H:500:nocfg:latent", "eager", "time", 18.0),
        ("H:500:cfg:decoded", "ours", "time", 30.0),
        ("warm-up", "ours", "time", 1.0),  # of another form
    ]
    text = report.text(results(tmp_path / "results", "sampling", *rows), tmp_path)
    _, appendix, eager, compiled, ours, batch, peak, over_eager, _, mfu, ceiling, a100 = cells(
        text, "H, no guidance, latents"
    )
    assert (appendix, eager, compiled, ours, batch, peak, over_eager) == (
        "89.0", "18.0", "–", "12.0", "500", "9.00", "1.50×",
    )  # fmt: skip
    rate = 500 * 50 * image_flops("H") / 12
    assert mfu == f"{rate / 989e12:.0%}" and ceiling == f"{rate / 800e12:.0%}"
    assert float(a100) == pytest.approx(12 * 989 / 312, rel=0.005)
    guided = cells(text, "H, guided, decoded")
    assert guided[1] == "178" and guided[4] == "30.0"
    assert guided[-3:] == ["–", "–", "–"]  # a decoder's FLOPs are not counted


def test_the_networks_flops_are_the_papers():
    """Table 1's "GFLOPs" are multiply-adds: 133 for H, 77 for L."""
    assert image_flops("H") / 2e9 == pytest.approx(133.2, rel=0.01)
    assert image_flops("L") / 2e9 == pytest.approx(76.5, rel=0.01)


def test_memory_stands_beside_the_published_figure(tmp_path):
    rows = [
        ("L:128:none", "paper", m, v) for m, v in (("peak", 47.4), ("reserved", 50.0), ("static", 4.6), ("saved", 42.0))
    ]
    text = report.text(results(tmp_path / "results", "memory", *rows), tmp_path)
    assert cells(text, "L:128:none | paper")[2:] == ["53.0", "47.4", "50.0", "4.60", "42.0"]


def test_every_plot_is_drawn_from_what_there_is_and_no_plot_of_nothing(tmp_path):
    folder = tmp_path / "results"
    results(folder, "memory", ("H:128:block", "ours", "peak", 13.6), ("H:128:block", "ours", "static", 10.0))
    results(folder, "sampling", ("S:500:nocfg:latent", "ours", "time", 2.0))
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "ops.png").write_bytes(b"of results that are gone")
    assert {path.stem for path in plot.write(folder)} == {"memory", "sampling"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"memory", "sampling"}
    text = report.text(Results(folder), tmp_path)
    assert "(plots/memory.png)" in text and "(plots/ops.png)" not in text
