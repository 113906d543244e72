"""`uvit-fast convert`: to a pipeline and back."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uvit_fast import cli, load_config
from uvit_fast.commands.arguments import config_of
from uvit_fast.provenance import Provenance, read

from .small import DIGITS, SMALL, sample


def test_convert_to_a_pipeline_and_back_keeps_every_weight(checkpoint, tmp_path, capsys):
    common, run = ["convert", "--config", DIGITS, *SMALL], checkpoint.parents[2]
    Provenance(("zero", "one")).write(run / "data.json")
    assert cli.main([*common, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "pipe")]) == 0
    back = tmp_path / "new" / "back.pth"
    assert cli.main([*common, "--checkpoint", str(tmp_path / "pipe"), "--out", str(back)]) == 0
    before, after = load_file(checkpoint), torch.load(back, weights_only=True)
    assert sorted(path.name for path in back.parent.iterdir()) == ["back.data.json", "back.pth"]
    diffusion = {"schedule": "vp", "prediction": "eps"}
    assert read(back) == read(checkpoint).joined(
        Provenance(diffusion=diffusion)
    )  # the names of its classes come back too
    assert read(back).classes == ("zero", "one")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert sample(tmp_path / "pipe", tmp_path / "out.npz", "--num", "1", "--steps", "1") == 0
    own = ["sample", "--checkpoint", str(tmp_path / "pipe"), "--out", str(tmp_path / "own.npz"), "--num", "1"]
    assert cli.main([*own, "--steps", "1"]) == 0  # a pipeline's folder says what it is
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("out", "own")))
    cfg, told = load_config(DIGITS, SMALL[1::2]), config_of(None, str(tmp_path / "pipe"), [])
    assert (told.model, told.diffusion, told.null_label) == (cfg.model, cfg.diffusion, cfg.null_label)
    assert (told.sample.sampler, told.sample.steps) == (cfg.sample.sampler, cfg.sample.steps)
    assert told.sample.guidance_scale == pytest.approx(cfg.sample.guidance_scale)
    assert cli.main([*common, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "pipe")]) == 2
    assert "there already" in capsys.readouterr().err


def test_without_its_extra_the_pipeline_names_what_installs_it(checkpoint, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("uvit_fast.pipeline")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    command = ["convert", "--config", DIGITS, *SMALL, "--checkpoint", str(checkpoint)]
    assert cli.main([*command, "--out", str(tmp_path / "pipe")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("uvit-fast: a pipeline needs diffusers: pip install ") and error.count("\n") == 1
    assert cli.main([*command, "--out", str(tmp_path / "back.pth")]) == 0  # needs none


def test_a_checkpoint_of_another_architecture_names_the_keys(checkpoint, tmp_path, capsys):
    code = cli.main(["sample", "--config", DIGITS, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])
    assert code == 2
    error = capsys.readouterr().err
    assert "another architecture" in error and "missing (in_blocks.1" in error and "of the wrong shape" in error
