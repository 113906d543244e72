"""The CSV files: what a run leaves of earlier ones."""

import csv

import pytest
import torch

from benchmarks.common import Rows


def test_rows_of_other_cases_stay_and_those_of_another_gpu_go(tmp_path, monkeypatch):
    def measured(device, case, value):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device != "cpu")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
        rows = Rows("ops", tmp_path)
        rows.add(case, "ours", [value], metric="time", unit="ms", dtype="bf16", batch=1)
        with open(rows.write(), newline="") as file:
            return {(row["device"], row["case"]): float(row["p50"]) for row in csv.DictReader(file)}

    assert measured("H100", "a", 1.0) == {("H100", "a"): 1.0}
    assert measured("H100", "b", 2.0) == {("H100", "a"): 1.0, ("H100", "b"): 2.0}
    assert measured("H100", "a", 3.0) == {("H100", "a"): 3.0, ("H100", "b"): 2.0}
    assert measured("cpu", "a", 9.0) == {("H100", "a"): 3.0, ("H100", "b"): 2.0, ("cpu", "a"): 9.0}
    assert measured("A100", "b", 4.0) == {("cpu", "a"): 9.0, ("A100", "b"): 4.0}


def test_rows_have_their_folder_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Rows("ops", tmp_path / "file")
    assert Rows("ops", tmp_path / "new" / "folder").path.parent.is_dir()


def test_a_file_of_a_run_that_measured_nothing_is_joined(tmp_path):
    assert Rows("ops", tmp_path).write().is_file() and Rows("ops", tmp_path).before == []


def test_what_this_commit_measured_is_known_to_the_next_run(tmp_path, monkeypatch):
    for commit, case in (("old", "a"), ("new", "b")):
        monkeypatch.setenv("COMMIT", commit)
        rows = Rows("sampling", tmp_path)
        rows.add(case, "eager", [1.0], metric="time", unit="ms", dtype="bf16", batch=1)
        rows.write()
    assert Rows("sampling", tmp_path).measured() == {("b", "eager")}
