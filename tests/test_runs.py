"""`uvit-fast runs --plot` and `--animate`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from uvit_fast import cli
from uvit_fast.commands import curves


@pytest.fixture
def runs(tmp_path):
    """Two that were measured, of which one lost the end of a row, and one that has not begun."""
    for i, name in enumerate(("a", "b", "c")):
        run = tmp_path / "runs" / name
        (run / "samples").mkdir(parents=True)
        (run / "config.yaml").write_text("train: {iterations: 100}\n")
        (run / "environment.json").write_text("{}")
        if name == "c":
            continue
        rows = [{"step": s, "loss": 2.0 / (s + i), "lr": 1e-3, "images_per_second": 50.0} for s in range(1, 101)]
        rows[7]["loss"] = float("nan")
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 101, "lo')
        figures = {"held_out_loss": 0.5 - i / 10, **({"digits-fid": 3.0} if i else {})}
        (run / "evaluation.jsonl").write_text(json.dumps({"step": 100, **figures}) + "\n")
    for step, shade in ((100, 200), (20, 100)):  # as files happen to be listed
        grid = np.full((20, 30 + step, 3), shade, np.uint8)
        Image.fromarray(grid).save(tmp_path / "runs" / "a" / "samples" / f"step_{step:08d}.png")
    (tmp_path / "runs" / "a" / "samples" / "grid.png").touch()
    return tmp_path / "runs"


def test_what_runs_wrote_is_drawn_in_one_picture(runs, capsys, monkeypatch):
    drawn = []
    line = curves._line
    monkeypatch.setattr(curves, "_line", lambda ax, *of: drawn.append((of[0], of[3], len(of[1]))) or line(ax, *of))
    assert cli.main(["runs", str(runs), "--plot"]) == 0
    assert capsys.readouterr().out == f"wrote {runs / 'runs.png'}\n"
    assert Image.open(runs / "runs.png").width > 1000
    both = [(panel, name, 100) for panel in ("loss", "images_per_second") for name in ("a", "b")]
    both[0], both[1] = ("loss", "a", 99), ("loss", "b", 99)  # without the one that is not finite
    assert drawn == [*both, ("held_out_loss", "a", 1), ("held_out_loss", "b", 1), ("digits-fid", "b", 1)]
    assert cli.main(["runs", str(runs / "b"), str(runs / "a"), "--plot", str(runs / "new" / "x.svg")]) == 0
    assert (runs / "new" / "x.svg").read_text().startswith("<?xml")


def test_sample_grids_become_an_animation_over_the_steps(runs, capsys):
    """In the order of the steps, each under its number, the last one held."""
    assert cli.main(["runs", str(runs / "a"), "--animate"]) == 0
    assert "wrote 2 grids of samples to" in capsys.readouterr().out
    with Image.open(runs / "a" / "samples.gif") as film:
        assert film.n_frames == 2 and film.info["loop"] == 0
        times, shades, above = [], [], []
        for frame in range(2):
            film.seek(frame)
            pixels = np.asarray(film.convert("L"))
            assert pixels.shape == (20 + 18, 130)  # of the larger one
            times.append(film.info["duration"])
            shades.append(round(float(pixels[-10, 5]), -1))
            above.append(pixels[:18])
    assert shades == [100, 200] and times == [200, 2000] and not np.array_equal(*above)


def test_damaged_runs_hide_no_others(runs, capsys, recwarn):
    """Rows and notes of other kinds, a folder where a file should be, a grid cut short, names that TeX would read."""
    (runs / "b" / "metrics.jsonl").write_text('{"step": NaN, "loss": [1], "images_per_second": null}\n')
    (runs / "b" / "environment.json").write_text('{"commit": 7}')
    (runs / "c" / "metrics.jsonl").mkdir()
    shutil.copytree(runs / "a", runs / "$a_{日本")
    shutil.copytree(runs / "a", runs / "odd")
    (runs / "odd" / "config.yaml").write_text("train: {iterations: many}\n")
    whole = (runs / "a" / "samples" / "step_00000020.png").read_bytes()
    (runs / "a" / "samples" / "step_00000030.png").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["runs", str(runs)]) == 0
    states = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert states == {"a": "no", "$a_{日本": "no", "b": "no", "c": "no", "odd": "unreadable"}  # no checkpoint
    assert cli.main(["runs", str(runs), "--plot"]) == 0 and not recwarn.list
    with pytest.warns(UserWarning, match="step_00000030.png: left out, it cannot be read"):
        assert cli.main(["runs", str(runs / "a"), "--animate"]) == 0
    assert "wrote 2 grids" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["DIR", "--animate"], "--animate: expected one run, got 3: "),
        (["DIR/b", "--animate"], "b/samples: no step_*.png; expected the grids that train.sample_every writes"),
        (["DIR/a", "--animate", "x.mp4"], "--animate x.mp4: expected a name that ends in .gif, .webp"),
        (["DIR/c", "--plot"], "c: no metrics.jsonl with rows; nothing to draw yet"),
        (["--plot", "DIR/a", "DIR/b"], "a: expected a name that ends in .png, .svg, .pdf; folders come before it"),
        (["DIR/no", "--plot"], "no: no such file or folder; expected a folder of runs, or a run"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(runs, arguments, words, capsys):
    assert cli.main(["runs", *(word.replace("DIR", str(runs)) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    assert curves._names([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert curves._names([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]
