"""The report says what the CSV files say, and only that."""

import csv
from pathlib import Path

import pytest

from benchmarks import plot, report, table
from benchmarks.common import COLUMNS, Rows
from benchmarks.results import Results, image_flops
from uvit_fast.runtime.errors import UserError


def results(folder, question, *rows, device="NVIDIA H100 80GB HBM3"):
    """A CSV file of rows (case, provider, metric, median, perhaps the unit), with ceilings."""
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
        for case, provider, metric, value, *unit in [*ceilings, *rows]:
            row = {"case": case, "provider": provider, "metric": metric, "unit": "".join(unit), "p50": value}
            writer.writerow(common | row)
    return Results(folder)


def cells(text, first):
    """The cells of the table row that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_report_is_what_the_committed_results_say():
    folder = Path(report.__file__).parent
    assert (folder / report.REPORT).read_text() == report.text(Results(), folder), "run `make report`"


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
        ("H:500:nocfg:latent", "torchao-fp8", "time", 12.6),
        ("H:500:nocfg:latent", "ours-fp8", "time", 7.0),
        ("H:500:cfg:decoded", "ours", "time", 30.0),
        ("warm-up", "ours", "time", 1.0),  # of another form
    ]
    text = report.text(results(tmp_path / "results", "sampling", *rows), tmp_path)
    _, appendix, eager, compiled, fp8, ours, over, narrow, narrow_over, batch, peak, mfu, ceiling, a100 = cells(
        text, "H, no guidance, latents"
    )
    assert (appendix, eager, compiled, fp8, ours, over, narrow, narrow_over, batch, peak) == (
        "89.0", "18.0", "–", "12.6", "12.0", "1.05× torchao-fp8", "7.00", "1.80× torchao-fp8", "500", "9.00",
    )  # fmt: skip
    rate = 500 * 50 * image_flops("H") / 12
    assert mfu == f"{rate / 989e12:.0%}" and ceiling == f"{rate / 800e12:.0%}"
    assert float(a100) == pytest.approx(12 * 989 / 312, rel=0.005)
    guided = cells(text, "H, guided, decoded")
    assert guided[1] == "178" and guided[5] == "30.0"
    assert guided[-3:] == ["–", "–", "–"]  # a decoder's FLOPs are not counted


def test_the_networks_flops_are_the_papers():
    """Table 1's "GFLOPs" are multiply-adds: 133 for H, 77 for L."""
    assert image_flops("H") / 2e9 == pytest.approx(133.2, rel=0.01)
    assert image_flops("L") / 2e9 == pytest.approx(76.5, rel=0.01)


def test_the_best_peer_is_named_whether_ours_is_ahead_or_not(tmp_path):
    found = results(
        tmp_path / "results",
        "training",
        ("H:128:none", "ours", "img_per_s", 600.0, "images/s"),
        ("H:128:none", "compiled", "img_per_s", 500.0, "images/s"),
        ("H:128:none", "torchao-fp8", "img_per_s", 750.0, "images/s"),
        ("H:128:none", "ours-uncaptured", "img_per_s", 900.0, "images/s"),
        ("H:128:none", "ours", "peak_gb", 30.0),
        ("H:128:none", "compiled", "peak_gb", 45.0),
        ("L:128:none", "eager", "img_per_s", 700.0, "images/s"),
    )
    assert found.peer("training", "H:128:none", "img_per_s") == ("torchao-fp8", 750.0, 0.8)
    assert found.peer("training", "H:128:none", "peak_gb") == ("compiled", 45.0, 1.5)
    assert found.peer("training", "L:128:none", "img_per_s") == ("eager", 700.0, None)
    assert found.peer("training", "L:128:none", "peak_gb") is None
    row = cells(report.text(found, tmp_path).partition("Steps without")[0], "H:128:none")
    assert row[:9] == ["H:128:none", "–", "500", "750", "600", "0.80× torchao-fp8", "30.0", "–", "1.50× compiled"]


def test_a_file_that_a_spreadsheet_wrote_and_cases_of_another_form_are_read(tmp_path):
    """With a byte order mark; an op's case without a width is left out."""
    rows = Rows("ops", tmp_path)
    for case in ("ln_mlp:fwd:1152", "ln_mlp:fwd", "ln_mlp:fwd:wide", "a:b:c:d"):
        rows.add(case, "ours", [2.0], metric="time", unit="ms", dtype="bf16", batch=128)
    path = rows.write()
    path.write_text("\ufeff" + path.read_text())
    written = report.text(Results(tmp_path), tmp_path)
    assert "ln_mlp fwd, D = 1152" in written and "wide" not in written


def test_a_ratio_is_of_one_device(tmp_path):
    """The last one that ran the case; another case may be another device's."""
    older = {"date": "2026-01-01", "device": "H100", "metric": "time", "unit": "ms"}
    newer = older | {"date": "2026-01-02", "device": "H200"}
    rows = [newer | {"case": "a", "provider": "ours", "p50": 1.0}, newer | {"case": "a", "provider": "eager", "p50": 3}]
    rows += [
        newer | {"date": "2026-01-03", "case": "a", "provider": "eager", "p50": 4.0},  # measured again
        older | {"case": "a", "provider": "compiled", "p50": 0.5},
        older | {"case": "b", "provider": "ours", "p50": 7.0},
    ]
    with open(tmp_path / "ops.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="0")
        writer.writeheader()
        writer.writerows(rows)
    found = Results(tmp_path)
    assert found.peer("ops", "a", "time") == ("eager", 4.0, 4.0)
    assert found.value("ops", "b", "ours", "time") == 7.0


def test_few_images_and_plain_calls_stand_beside_their_best_peer(tmp_path):
    rows = [
        ("H:8:nocfg:latent", "ours", "time", 18.0),
        ("H:8:nocfg:latent", "compiled-graphs", "time", 20.0),
        ("H:8:nocfg:latent", "eager", "time", 30.0),
        ("forward:H:8", "ours", "time", 40.0),
        ("forward:H:8", "ours-fp8", "time", 20.0),
        ("forward:H:8", "eager", "time", 10.0),
    ]
    text = report.text(results(tmp_path / "results", "sampling", *rows), tmp_path)
    loop = ["288", "–", "480", "–", "320", "–", "1.11× compiled-graphs", "–"]  # ms of a loop of 8 images
    assert cells(text, "H:8:nocfg:latent")[1:] == loop
    call = ["40.0", "20.0", "10.0", "–", "–", "–", "0.25× eager", "0.50× eager"]
    assert cells(text, "forward:H:8")[1:] == call


def test_memory_stands_beside_the_published_figure(tmp_path):
    results(tmp_path / "results", "training", ("L:128:none", "compiled", "peak_gb", 30.0))
    rows = [("L:128:none", "paper", "peak", 47.4), ("L:128:none", "ours", "peak", 20.0)]
    text = report.text(results(tmp_path / "results", "memory", *rows), tmp_path)
    _, _, memory = text.partition("## Memory")
    assert cells(memory, "L:128:none")[1:] == ["53.0", "47.4", "–", "20.0", "30.0", "1.50× compiled"]


def test_every_plot_is_drawn_from_what_there_is_and_no_plot_of_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    monkeypatch.setattr(plot, "COMMITTED", folder / "plots")
    results(folder, "memory", ("H:128:block", "ours", "peak", 13.6), ("H:128:block", "ours", "static", 10.0))
    results(folder, "sampling", ("S:500:nocfg:latent", "ours", "time", 2.0))
    (folder / "plots").mkdir()
    (folder / "plots" / "ops.png").write_bytes(b"of results that are gone")
    assert {path.stem for path in plot.write(folder)} == {"memory", "sampling"}
    assert {path.stem for path in (folder / "plots").iterdir()} == {"memory", "sampling"}
    text = report.text(Results(folder), folder)
    assert "(plots/memory.png)" in text and "(plots/ops.png)" not in text


@pytest.mark.parametrize(("name", "came"), [("file", "a file"), ("missing", "none")])
def test_a_folder_that_is_none_is_told(name, came, tmp_path):
    (tmp_path / "file").touch()
    for write in (report.write, plot.write):
        with pytest.raises(UserError, match=f"{name}: expected a folder of benchmarks' rows, got {came}"):
            write(tmp_path / name)


def test_files_of_others_among_the_rows_stay(tmp_path):
    """Pictures of what was not measured and tables are no part of the report; what would be replaced is refused."""
    results(tmp_path, "memory", ("H:128:block", "ours", "peak", 13.6), ("H:128:block", "ours", "static", 10.0))
    ours, theirs = (tmp_path / "plots" / f"{name}.png" for name in ("memory", "training"))
    theirs.parent.mkdir()
    theirs.write_bytes(b"a user's")
    (tmp_path / "training.csv").write_text("epoch,loss\n1,2\n")
    assert plot.write(tmp_path) == plot.write(tmp_path) == [ours]  # the second time over its own
    assert report.write(tmp_path) == report.write(tmp_path) == tmp_path / "REPORT.md"
    text = (tmp_path / "REPORT.md").read_text()
    assert theirs.read_bytes() == b"a user's" and "(plots/memory.png)" in text and "(plots/training.png)" not in text
    (tmp_path / "REPORT.md").write_text("# Benchmarks\n\nof a user")
    ours.write_bytes(b"a user's")
    for write, name in ((plot.write, "plots/memory.png"), (report.write, "REPORT.md")):
        with pytest.raises(UserError, match=f"{name}: expected a .* of the benchmarks, or none"):
            write(tmp_path)
    assert ours.read_bytes() == b"a user's" and (tmp_path / "REPORT.md").read_text() == "# Benchmarks\n\nof a user"


def test_a_fine_tuning_stands_beside_the_training_of_all_weights(tmp_path):
    rows = [
        ("H:128:block", "ours", "img_per_s", 600.0, "images/s"),
        ("H:128:block", "compiled", "img_per_s", 500.0, "images/s"),
    ]
    rows += [
        ("H:128:block", "ours-out_blocks", m, v)
        for m, v in (("img_per_s", 900.0), ("static_gb", 5.2), ("peak_gb", 9.0))
    ]
    found = results(tmp_path, "training", *rows)
    text = "\n".join(report.frozen(found))
    assert cells(text, "H:128:block")[1:] == ["[out_blocks,norm,decoder_pred,label_emb]", "900", "1.50", "5.20", "9.00"]
    assert found.peer("training", "H:128:block", "img_per_s").name == "compiled"  # a fine-tuning is none


def test_a_step_without_graphs_stands_beside_eagers(tmp_path):
    rows = [
        ("H:16:none", who, "img_per_s", speed, "images/s")
        for who, speed in (("ours-uncaptured", 400.0), ("eager", 300.0), ("compiled", 320.0))
    ]
    rows += [("S:128:none", "eager", "img_per_s", 3000.0, "images/s")]
    found = results(tmp_path, "training", *rows)
    text = "\n".join(report.uncaptured(found))
    assert cells(text, "H:16:none")[1:] == ["400", "300", "320", "–", "1.33×", "1.25×"] and "S:128" not in text
    line = cells(table.table(found), "H/2 training step without CUDA graphs, batch 16, images/s")
    assert line[1:] == ["–", "400", "320 compiled", "1.25×"]
    assert plot.training(found) is None  # its picture is of steps of 128 images


def test_a_peer_that_is_ahead_is_named_below_the_table(tmp_path):
    rows = [
        ("forward:L:1", "ours", "time", 1.2),
        ("forward:L:1", "compiled-graphs", "time", 1.1),
        ("H:500:nocfg:latent", "ours", "time", 10.0),
        ("H:500:nocfg:latent", "eager", "time", 12.0),
    ]
    found = results(tmp_path, "sampling", *rows)
    assert table.behind(found).endswith(" in bf16: L/2, a plain call of one image: 0.92× compiled-graphs.")
    assert table.behind(found) in " ".join(table.table(found).split())
    step = [("S:128:none", "ours", "img_per_s", 9.0, "images/s"), ("S:128:none", "eager", "img_per_s", 8.0, "images/s")]
    assert table.behind(results(tmp_path / "other", "training", *step)).endswith(" in bf16: none.")
