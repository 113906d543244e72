"""Tuning: what is written is what is read, and the best of what was measured."""

import json

import pytest
import torch

from uvit_fast import cli
from uvit_fast.kernels.gemm import fp8, sm90, sm90_fp8
from uvit_fast.kernels.runtime import device, launch, tuning
from uvit_fast.kernels.runtime.device import forced
from uvit_fast.kernels.tools import tune
from uvit_fast.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def small_gpu(monkeypatch):
    """Cases that run nothing, timed by a clock that likes four warps, and more rows at D = 64; one candidate cannot
    run.
    """
    table = {"default": {"rows": 1, "warps": 1}, "prepare": {"rows": 1, "warps": 2}}
    monkeypatch.setattr(tuning, "table", lambda arch: table)
    monkeypatch.setattr(tune, "candidates", lambda arch: {"prepare": tune._grid(rows=[1, 2], warps=[2, 4, 8])})

    def run(D):
        choice = tuning.choice(CPU, "prepare", D)
        if choice["warps"] == 8:
            raise RuntimeError("too many warps")
        return 1.0 - 0.1 * (choice["warps"] == 4) - 0.1 * (choice["rows"] == 2 and D == 64)

    monkeypatch.setattr(tune, "cases", lambda D, device: [("prepare", str(D), lambda: run(D)), ("unknown", "1", None)])
    monkeypatch.setattr(tune, "milliseconds", lambda calls: [call() for call in calls])


def test_the_fastest_that_runs_is_chosen_for_each_width(small_gpu):
    lines = []
    table = tune.tune([64, 128, 192], CPU, lines.append)
    assert table["prepare"] == {"rows": 1, "warps": 4} and table["prepare:64"] == {"rows": 2, "warps": 4}
    assert "prepare:128" not in table and "prepare:192" not in table
    assert any("cannot run: too many warps" in line for line in lines)


def test_cases_that_are_not_measured_stay(small_gpu):
    tuning.table(90)["gemm"] = {"part": 32}
    table = tune.tune([64], CPU, lambda line: None, only=["prepare"])
    assert table["gemm"] == {"part": 32} and table["prepare"] == {"rows": 2, "warps": 4}


def test_a_gain_within_the_noise_changes_nothing(small_gpu, monkeypatch):
    monkeypatch.setattr(tune, "milliseconds", lambda calls: [1 - 0.05 * (1 - call()) for call in calls])
    assert tune.tune([64], CPU, lambda line: None)["prepare"] == {"rows": 1, "warps": 2}


def test_what_begins_early_still_does_with_another_tile(small_gpu, monkeypatch):
    table = tuning.table(90) | {"few:64x64:258": {"tokens": 64, "early": 4}}
    monkeypatch.setattr(tuning, "table", lambda arch: table)
    monkeypatch.setattr(tune, "candidates", lambda arch: {"few": [{"tokens": 64}, {"tokens": 128}]})
    run = ("few", "64x64:258", lambda: 1 / table["few:64x64:258"]["tokens"])
    monkeypatch.setattr(tune, "cases", lambda D, device: [run])
    assert tune.tune([64], CPU, lambda line: None)["few:64x64:258"] == {"tokens": 128, "early": 4}


def test_the_committed_tables_are_as_written_by_tune(tmp_path):
    for arch in (80, 90):
        table = json.loads(tuning.path(arch).read_text())
        tune.write(table, tmp_path / "table.json")
        assert (tmp_path / "table.json").read_text() == tuning.path(arch).read_text()
        names = {key.partition(":")[0] for key in table} - {"default"}
        assert names <= tune.candidates(arch).keys()


def test_every_case_calls_what_the_ops_call(monkeypatch):
    """On the CPU's core without its kernels, every case of a block runs and asks the table for its own entry."""
    asked = set()
    choice = tuning.choice
    monkeypatch.setattr(
        tuning, "choice", lambda device, case, width: asked.add(f"{case}:{width}") or choice(device, case, width)
    )
    monkeypatch.setattr(tune, "TOKENS", 4)
    monkeypatch.setattr(launch, "run", lambda *launched: None)
    for case, width, f in tune.cases(64, CPU):
        if case in tune.candidates(80):
            f()
            assert f"{case}:{width}" in asked, case
    few = tuning.few
    monkeypatch.setattr(
        tuning,
        "few",
        lambda device, case, *size: asked.add("{}:{}x{}:{}".format(case, *size)) or few(device, case, *size),
    )
    for module in (sm90, sm90_fp8):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    with forced(90):
        for case, width, f in tune.fp8_cases(64, CPU):
            f()
            assert f"{case}:{width}" in asked, case
    names = {entry.partition(":")[0] for entry in asked}
    assert tune.candidates(80).keys() <= names
    assert {"fp8_few", *fp8.CASES.values()} <= names & tune.candidates(90).keys()


def test_tuning_without_a_gpu_or_of_a_width_that_no_op_takes_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2 and capsys.readouterr().err == "uvit-fast: tune: expected a GPU, got none\n"
    assert cli.main(["tune", "--dims", "100"]) == 2 and "multiples of 64, got 100" in capsys.readouterr().err


def test_choices_for_few_tokens_stand_each_for_itself():
    same = {"tokens": 64}
    few = {"few": {"8x4:258": same, "8x4:516": same}, "fp8_few": {"8x4:258": same}}
    table = tune.compact({"part": 64}, few | {"gemm": {"8": {"part": 32}}})
    each = {"few:8x4:258": same, "few:8x4:516": same, "fp8_few:8x4:258": same}
    assert table == {"default": {"part": 64}, **each, "gemm": {"part": 32}}


def test_an_architecture_that_none_of_the_tables_is_for_is_refused(monkeypatch):
    for asked in ("70", "9.0", "hopper"):
        monkeypatch.setenv("UVIT_FAST_ARCH", asked)
        with pytest.raises(UserError, match=f"UVIT_FAST_ARCH: expected 80 or 90, got '{asked}'"):
            device._forced()
