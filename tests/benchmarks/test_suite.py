"""The suite knows what it can run here, how long it will take, and that its benchmarks still take these arguments."""

import importlib
import sys

import pytest

from benchmarks import common, suite
from benchmarks.suite import Plan, Progress
from uvit_fast import cli
from uvit_fast.runtime.errors import UserError


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_without_a_gpu_the_rest_runs_and_what_needs_one_is_named():
    plans, left_out = suite.plan(0, quick=False, only=[], measured={})
    assert [p.name for p in plans] == ["evaluation", "data"]
    assert {"sampling", "training", "memory", "ops", "attention", "scaling"} <= set(left_out)


def test_scaling_needs_two_gpus_and_takes_all():
    (p,), left_out = suite.plan(1, quick=False, only=["data", "scaling"], measured={})
    assert (p.name, left_out) == ("data", ["scaling"])
    (p,), _ = suite.plan(8, quick=False, only=["scaling"], measured={})
    assert p.arguments == "--gpus 8"


def test_the_quick_selection_stays_under_seven_minutes():
    plans, left_out = suite.plan(1, quick=True, only=[], measured={})
    assert left_out == ["scaling"] and sum(p.seconds for p in plans) < 7 * 60


def test_what_this_device_took_before_is_the_better_estimate():
    (p,), _ = suite.plan(1, quick=True, only=["ops"], measured={"ops --dims 1152": 31.5})
    assert (p.arguments, p.seconds) == ("--dims 1152", 31.5)


def test_an_unknown_benchmark_is_told_what_there_is():
    with pytest.raises(UserError, match="expected some of ops, attention, .*, got sampler"):
        suite.plan(1, quick=True, only=["sampler"], measured={})


def test_a_selection_that_cannot_run_here_ends_in_one_line():
    with pytest.raises(UserError, match="--only sampling,scaling: needs more GPUs than the 0 here; expected of eval"):
        suite.plan(0, quick=True, only=["sampling", "scaling"], measured={})


def test_the_time_left_follows_the_pace():
    now = Clock()
    progress = Progress([Plan("a", "", 10), Plan("b", "", 20), Plan("c", "", 30)], now)
    assert progress.left() == 60
    now.seconds = 4
    assert progress.left() == 56
    now.seconds = 20  # a took twice its time
    assert progress.left() == 50 and progress.finish() == 20
    assert progress.left() == 100 and progress.line() == "[2/3 b, 1:40 left]"


@pytest.mark.parametrize("bench", suite.SUITE, ids=lambda bench: bench.name)
def test_every_benchmark_takes_the_arguments_that_the_suite_gives(bench, monkeypatch):
    class Reached(Exception):
        pass

    def rows(question, folder):
        assert str(folder) == "elsewhere"
        raise Reached

    module = importlib.import_module(f"benchmarks.bench_{bench.name}")
    monkeypatch.setattr(module, "Rows", rows)
    monkeypatch.setattr(module, "need_gpu", lambda *_: None, raising=False)
    for how in filter(None, (bench.full, bench.quick, bench.cpu)):
        monkeypatch.setattr(sys, "argv", ["bench", *how[0].split(), "--out", "elsewhere"])
        with pytest.raises(Reached):
            module.main()


@pytest.mark.parametrize("name", [*(f"bench_{bench.name}" for bench in suite.SUITE), "fp8_quality"])
def test_rows_that_it_cannot_join_end_a_benchmark_in_one_line(name, tmp_path, monkeypatch, capsys):
    """Nothing has been measured by then, and the file stays as it is."""
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "need_gpu", lambda *_: None, raising=False)
    networks = ["S"] if name == "fp8_quality" else []
    monkeypatch.setattr(sys, "argv", [name, *networks, "--out", str(tmp_path)])
    file = tmp_path / f"{name.removeprefix('bench_')}.csv"
    older = ",".join(column for column in common.COLUMNS if column != "batch")
    for content, came in (
        (b"epoch,loss\n1,2\n", "the columns epoch, loss"),
        (older.encode(), "the columns date, commit, "),
        (b"\x89PNG\xff", "no text"),
        (",".join(common.COLUMNS).encode() + b"\n2026-01-01,ab", "'2026-01-01,ab'"),
        (None, "a folder"),
    ):
        file.mkdir() if content is None else file.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            module.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and f"{file}: " in error and f"got {came}" in error
        assert file.is_dir() if content is None else file.read_bytes() == content
        if content is not None:
            file.unlink()


def test_a_benchmark_that_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capfd):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bench_data.py").write_text("import sys\nsys.exit(2 * ('--worse' in sys.argv))\n")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    rows = suite.Rows("suite", tmp_path)
    plans = [Plan("data", "--worse", 1), Plan("data", "--better", 1)]
    assert suite.run(plans, tmp_path, rows) == ["data"]
    assert [row["case"] for row in rows.rows] == ["data --better"]
    assert "data: failed with exit code 2" in capfd.readouterr().out


def test_the_command_hands_over_and_returns_the_suites_code(tmp_path, capfd):
    assert cli.main(["bench", "--only", "nothing", "--out", str(tmp_path / "results")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("uvit-fast: bench: --only: expected some of ops") and error.count("\n") == 1
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        suite.main(["--only", "data", "--out", str(tmp_path / "file")])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "file: expected a folder, got a file" in error and error.count("\n") == 1


def test_all_of_a_run_goes_into_its_folder(tmp_path, monkeypatch, capsys):
    """A REPORT.md or plots/ beside it, which may be the user's, stays as it is."""
    (tmp_path / "REPORT.md").write_text("the user's")
    monkeypatch.setattr(suite, "run", lambda plans, out, rows: [])
    assert suite.main(["--only", "data", "--out", str(tmp_path / "results")]) == 0
    assert (tmp_path / "REPORT.md").read_text() == "the user's"
    assert {path.name for path in tmp_path.iterdir()} == {"REPORT.md", "results"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"REPORT.md"}  # no plot of nothing
    assert "data; about 1 min (" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["REPORT.md", "data.csv", "suite.csv", "plots/scaling.png", "plots"])
def test_what_would_replace_a_users_file_is_not_begun(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "run", lambda plans, out, rows: pytest.fail("measured"))
    monkeypatch.setattr(suite, "plan", lambda *_: ([Plan("data", "", 1), Plan("scaling", "", 1)], []))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("the user's")
    with pytest.raises(SystemExit) as stop:
        suite.main(["--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{tmp_path / name}: expected" in error and error.count("\n") == 1
    assert (tmp_path / name).read_text() == "the user's"


def test_files_that_a_run_would_not_replace_are_no_reason_to_refuse_it(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "run", lambda plans, out, rows: [])
    theirs = [tmp_path / name for name in ("plots/training.png", "ops.csv", "notes.csv")]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("the user's")
    for _ in range(2):  # the second time over its own report
        assert suite.main(["--only", "data", "--out", str(tmp_path)]) == 0
    assert {path.read_text() for path in theirs} == {"the user's"}


def test_the_committed_rows_have_their_report_beside_them():
    assert common.report_folder(common.RESULTS) == common.RESULTS.parent
