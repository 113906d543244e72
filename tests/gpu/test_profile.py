"""A profile on a GPU is made of kernels."""

import csv

import pytest

from uvit_fast import cli

pytestmark = pytest.mark.gpu


def test_sampling_is_mostly_kernels_and_they_have_their_families(pytestconfig, tmp_path, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    arguments = ["--batch", "32", "--only", "sampling", "--set", "sample.steps=6", "--out", str(tmp_path)]
    assert cli.main(["profile", "--config", "configs/l2_256.yaml", *arguments]) == 0
    with open(tmp_path / "sampling.csv") as file:
        rows = {row["family"]: row for row in csv.DictReader(file)}
    share = {family: float(row["share"]) for family, row in rows.items()}
    assert share["linear"] > 0.3 and share["attention"] > 0.02 and share["elementwise"] < 0.05
    assert share["idle"] < 0.2  # a captured loop does not wait for the host
    assert float(rows["attention"]["calls"]) == 21 * 6  # a kernel a block and evaluation
    assert float(rows["elementwise"]["calls"]) > 2 * 21 * 6  # two LayerNorms' statistics a block, and the solver
