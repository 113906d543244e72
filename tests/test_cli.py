"""The commands: what they write, and one clear line for each mistake."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from uvit_fast import build_model, cli, load_config, sampling

DIGITS = "configs/digits.yaml"
SMALL = ["--set", "model.embed_dim=32", "--set", "model.depth=2"]


@pytest.fixture
def checkpoint(tmp_path):
    """Random weights of a small digits model, as a training run saves its EMA."""
    cfg = load_config(DIGITS, SMALL[1::2])
    path = tmp_path / "run" / "checkpoints" / "step_00000010" / "ema.safetensors"
    path.parent.mkdir(parents=True)
    save_file(build_model(cfg).state_dict(), path)
    return path


def sample(checkpoint, out, *more):
    return cli.main(["sample", "--config", DIGITS, *SMALL, "--checkpoint", str(checkpoint), "--out", str(out), *more])


def test_sample_writes_pngs_and_a_grid(checkpoint, tmp_path):
    assert sample(checkpoint, tmp_path / "out", "--num", "4", "--classes", "3,7", "--steps", "2") == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["000000_class3.png", "000001_class3.png", "000002_class7.png", "000003_class7.png", "grid.png"]
    assert Image.open(tmp_path / "out" / names[0]).size == (8, 8)
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * 40  # scaled up for a person


def test_a_sample_depends_on_seed_and_index_only(checkpoint, tmp_path):
    """Another batch size, or a run folder in place of a file, changes nothing; another seed changes everything."""
    files = [tmp_path / f"{i}.npz" for i in range(3)]
    common = ("--num", "5", "--classes", "1", "--steps", "3")
    assert sample(checkpoint, files[0], *common, "--batch", "5") == 0
    assert sample(checkpoint.parents[2], files[1], *common, "--batch", "2") == 0
    assert sample(checkpoint, files[2], *common, "--seed", "1") == 0
    a, b, c = (np.load(file) for file in files)
    assert a["arr_0"].shape == (5, 8, 8, 1) and a["arr_0"].dtype == np.uint8 and a["arr_1"].tolist() == [1] * 5
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1  # batched matrix products may round differently
    assert (a["arr_0"] != c["arr_0"]).any(axis=(1, 2, 3)).all()


def test_an_interrupted_job_continues_without_repeating_or_losing_a_sample(checkpoint, tmp_path, monkeypatch, capsys):
    whole, resumed, common = (
        tmp_path / "whole.npz",
        tmp_path / "resumed.npz",
        ("--num", "10", "--batch", "3", "--steps", "2"),
    )
    assert sample(checkpoint, whole, *common) == 0
    draw, drawn = sampling.sample, []

    def dies_at_the_third(*args, **options):
        drawn.append(options["first"])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*args, **options)

    monkeypatch.setattr(sampling, "sample", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sample(checkpoint, resumed, *common)
    assert not resumed.exists()
    assert sample(checkpoint, resumed, *common) == 2  # what is there is not thrown away unasked
    assert "continue it with --resume" in capsys.readouterr().err
    assert sample(checkpoint, resumed, *common, "--seed", "1", "--resume") == 2
    assert "--resume expected seed 0, got 1" in capsys.readouterr().err
    assert sample(checkpoint, resumed, *common, "--resume") == 0
    assert drawn == [0, 3, 6, 6, 9]  # the part that was under way is drawn again, the finished ones are not
    assert np.array_equal(np.load(whole)["arr_0"], np.load(resumed)["arr_0"])
    assert not (tmp_path / "resumed.npz.parts").exists()


def test_two_processes_share_a_job(checkpoint, tmp_path):
    alone, together, common = (
        tmp_path / "alone.npz",
        tmp_path / "together.npz",
        ("--num", "7", "--batch", "2", "--steps", "2"),
    )
    assert sample(checkpoint, alone, *common) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    command = ["-m", "--", "uvit_fast.cli", "sample", "--config", DIGITS, *SMALL, "--checkpoint", str(checkpoint)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, *command, "--out", str(together), *common], env=environment, check=True, capture_output=True
    )
    assert np.abs(np.load(alone)["arr_0"].astype(int) - np.load(together)["arr_0"]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--config", "configs/digit.yaml"], "did you mean configs/digits.yaml?"),
        (["sample", "--config", DIGITS, "--set", "model.dept=3"], "did you mean 'depth'?"),
        (
            ["sample", "--config", DIGITS, "--classes", "3,10"],
            "expected labels from 0 to 9, got 10",
        ),  # 10 is the null label
        (["sample", "--config", DIGITS, "--classes", "three"], "expected whole numbers"),
        (["sample", "--config", "configs/s2_cifar10.yaml", "--classes", "3"], "not class-conditional"),
        (["sample", "--config", DIGITS, "--cfg-scale", "0.4"], "expected at least 1"),
        (["sample", "--config", DIGITS, "--set", "device=cuda"], "no CUDA device was found"),
        (["sample", "--config", DIGITS], "x.pth: no such checkpoint"),
        (["sample", "--config", DIGITS, "--checkpoint", "configs"], "configs: no EMA weights"),
        (["demo", "--run-dir", "configs"], "configs: no run"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if arguments[0] == "sample":
        arguments = [
            *arguments,
            *([] if "--checkpoint" in arguments else ["--checkpoint", "x.pth"]),
            "--out",
            str(tmp_path),
        ]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("uvit-fast: ") and error.count("\n") == 1


def test_convert_to_a_pipeline_and_back_keeps_every_weight(checkpoint, tmp_path, capsys):
    common = ["convert", "--config", DIGITS, *SMALL]
    assert cli.main([*common, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "pipe")]) == 0
    assert cli.main([*common, "--checkpoint", str(tmp_path / "pipe"), "--out", str(tmp_path / "back.pth")]) == 0
    before, after = load_file(checkpoint), torch.load(tmp_path / "back.pth", weights_only=True)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert sample(tmp_path / "pipe", tmp_path / "out.npz", "--num", "1", "--steps", "1") == 0
    assert cli.main([*common, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "pipe")]) == 2
    assert "there already" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_names_the_keys(checkpoint, tmp_path, capsys):
    code = cli.main(["sample", "--config", DIGITS, "--checkpoint", str(checkpoint), "--out", str(tmp_path)])
    assert code == 2
    error = capsys.readouterr().err
    assert "another architecture" in error and "missing (in_blocks.1" in error and "of the wrong shape" in error


def test_numbers_below_one_are_refused_by_the_parser(capsys):
    for option in ("--num", "--steps", "--batch"):
        with pytest.raises(SystemExit) as stop:
            sample("x.pth", "out", option, "0")
        assert stop.value.code == 2
        assert "expected a whole number of at least 1, got '0'" in capsys.readouterr().err


def test_info_says_what_would_run_and_why(capsys):
    assert cli.main(["info", "--config", "configs/h2_256.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in out
    for line in ("16 heads of 72", "attention", "ln_mlp", "skip_linear"):
        assert line in out
