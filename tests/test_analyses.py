"""`uvit-fast cost`, `cka` and `sweep`."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from uvit_fast import cli
from uvit_fast.build import build_model
from uvit_fast.commands import cost, sweep
from uvit_fast.config import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
FILE = "digits"  # of configs/ablations


@pytest.mark.parametrize("name", cost.PAPER)
def test_the_papers_sizes_within_one_percent(name):
    """Or within the paper's rounding, where that is more: S/2 is 44M."""
    parameters, macs = cost.count(load_config(CONFIGS / f"{name}.yaml"))
    millions, gflops = cost.PAPER[name]
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)
    if gflops:
        assert macs / 1e9 == pytest.approx(gflops, rel=0.01)


def test_cost_prints_every_config(monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS)
    assert cli.main(["cost", "--config", "digits.yaml", "h2_256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["h2_256", "500,832,016", "500.8", "501", "133.2", "133"]


def test_cost_without_diffusers_leaves_out_the_unets_only(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    cost.count.cache_clear()
    assert cli.main(["cost"]) == 0
    out = capsys.readouterr().out
    assert "\nh4_512 " in out and out.count("left out: unet_") == 2 and 'pip install -e ".[diffusers]"' in out
    assert cli.main(["cost", "--config", "unet_adm_256"]) == 2


def test_cka_without_matplotlib_ends_before_it_computes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert (
        cli.main(
            [
                "cka",
                "--config",
                str(CONFIGS / "digits.yaml"),
                "--checkpoint",
                str(CONFIGS),
                "--out",
                str(tmp_path / "cka"),
            ]
        )
        == 2
    )
    assert 'a picture needs matplotlib: pip install -e ".[plot]"' in capsys.readouterr().err


def test_cka_of_weights_is_written_and_drawn(tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    save_file(build_model(load_config(CONFIGS / "digits.yaml")).state_dict(), weights)
    command = ["cka", "--config", str(CONFIGS / "digits.yaml"), "--checkpoint", str(weights), "--images", "16"]
    assert cli.main([*command, "--batch", "8", "--out", str(tmp_path / "cka")]) == 0
    with open(tmp_path / "cka.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["block"], r["other_block"]) for r in rows[:6]] == [*[("1", str(j)) for j in range(1, 6)], ("2", "1")]
    assert all(float(r["cka"]) == 1 for r in rows if r["block"] == r["other_block"])
    assert (tmp_path / "cka.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*command, "--batch", "3", "--out", str(tmp_path / "cka")]) == 2
    assert "--batch: expected 4 to 16" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "fashion", "s2_cifar10"])
def test_a_sweep_varies_one_factor_at_a_time_around_one_base(name):
    members = sweep.read_members(CONFIGS / "ablations" / f"{name}.yaml", [], [])
    assert members[0].name == "base" and len(members) == 9  # four factors of three values, the base in each
    assert [factor for factor, _ in members[0].points] == ["depth", "width", "patch size", "skip"]
    base = members[0].config.model.model_dump()
    for member in members[1:]:
        changed = {key for key, value in member.config.model.model_dump().items() if value != base[key]}
        assert len(changed - {"num_heads"}) == 1 and len(member.points) == 1
        with torch.device("meta"):
            build_model(member.config)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Trainings and measurements stand-ins: each is called once in all, though one failed at first; the CSV holds what
    is done.
    """
    calls, fails = [], ["skip-add"]

    def call(self, command, folder):
        what = command[2]  # python -m uvit_fast ...
        calls.append((what, folder.name))
        if what == "train" and folder.name in fails:
            return "failed"
        if what == "train":
            rows = [{"step": step, "loss": 1 / step} for step in (10, 20)]
            (folder / "environment.json").write_text('{"device": "x86_64", "cuda": null}')
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            Path(command[-1]).write_text(json.dumps({"metrics": {"digits-fid": len(folder.name), "digits-sfid": 0}}))
        return None

    monkeypatch.setattr(sweep._Work, "_call", call)
    command = ["sweep", "--config", FILE, "--only", "skip", "--out", str(tmp_path), "--jobs", "2"]
    assert cli.main(command) == 1
    assert read(tmp_path / "sweep.csv", "value") == ["concat", "none"]
    assert f"wrote {tmp_path / 'factors.png'} and {tmp_path / 'losses.png'}\n" in capsys.readouterr().out
    fails.clear()
    assert cli.main(command) == 0
    assert sorted(name for what, name in calls if what == "evaluate") == ["base", "skip-add", "skip-none"]
    assert read(tmp_path / "sweep.csv", "value") == ["concat", "add", "none"]
    assert read(tmp_path / "sweep.csv", "figure") == ["4", "8", "9"]
    assert read(tmp_path / "losses.csv", "loss")[:2] == ["0.1", "0.05"]
    assert {"factors.png", "losses.png"} <= {path.name for path in tmp_path.iterdir()}


def test_mistakes_in_a_sweep_are_named(tmp_path, capsys):
    assert cli.main(["sweep", "--config", FILE, "--only", "depht"]) == 2
    assert "--only: expected some of depth, width" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text(
        f"base: {CONFIGS / 'digits.yaml'}\nfactors: {{a: {{model.depth: [2], train.lr: []}}}}"
    )
    assert cli.main(["sweep", "--config", str(tmp_path / "x.yaml")]) == 2
    assert "factors.a: expected as many values for each of model.depth, train.lr" in capsys.readouterr().err


def read(path: Path, column: str) -> list[str]:
    with open(path, newline="") as file:
        return [row[column] for row in csv.DictReader(file)]
