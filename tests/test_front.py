"""`uvit-fast front`: every point once, none twice, and of all of them those that no other beats."""

import csv
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import save_file

from uvit_fast import build_model, cli, load_config
from uvit_fast.commands.points import COLUMNS, Measured, Point, as_good, pareto, summarised
from uvit_fast.runtime.errors import UserError

POINT = Point("dpmpp_2m", 20, 0.4, (0.0, 1.0), "bf16", "none")


def measured(seconds, *figures, **changes):
    return Measured(POINT._replace(**changes), list(figures), seconds)


def point_of(cfg):
    sample = cfg.sample
    return Point(sample.sampler, sample.steps, sample.guidance_scale, (0.0, 1.0), sample.precision, sample.cache)


def test_the_front_is_what_no_other_beats():
    a, b, c, d, e = (measured(*each) for each in ((1, 9), (2, 5), (3, 6), (4, 5), (5, 2)))
    assert pareto([e, d, c, b, a]) == [a, b, e]
    assert pareto([measured(1, 3), measured(1, 2)]) == [measured(1, 2)]


def test_as_good_is_within_the_seeds_of_the_most_evaluations():
    """Against fewer evaluations, which a plan of cached layers has to beat."""
    points = [
        measured(10, 2.0, 2.4, steps=50),
        measured(4, 2.3, 2.5, steps=20),
        measured(2, 3.0, 3.0, steps=10),
        measured(2.5, 2.1, 2.2, steps=50, cache="/plans/p.yaml"),
    ]
    first, whole, everything, on_it = as_good(points)
    assert "2.2; as good, worse by at most the 0.4" in first
    assert "without cached layers, in bf16: dpmpp_2m 20, s 0.4, 2.50 times as fast" in whole
    assert "of all: dpmpp_2m 50, s 0.4, p.yaml, 4.00 times as fast" in everything
    assert on_it == "with cached layers on the front: dpmpp_2m 50, s 0.4, p.yaml"
    assert as_good([*points[:3], measured(4.5, 2.7, steps=50, cache="outer:2")])[3].endswith("front: none")
    assert "at least 2" in as_good([measured(1, 2.0)])[0] and as_good([measured(1, 2.0, cache="outer:2")]) == []


def test_a_points_options_are_what_differs_from_the_config():
    cfg = load_config("configs/h2_256.yaml")
    point = Point("dpmpp_2m", cfg.sample.steps, 0.7, (0.1, 0.8), "bf16", "outer:3")
    line = point.lines(cfg)
    assert line == (
        "--set sample.sampler=dpmpp_2m --set sample.guidance_scale=0.7 --set 'sample.guidance_interval=[0.1,0.8]' "
        "--set sample.cache=outer:3"
    )
    again = load_config("configs/h2_256.yaml", line.replace("--set ", "").replace("'", "").split())
    assert again.sample.guidance_interval == (0.1, 0.8) and again.sample.cache == "outer:3"


def test_the_options_of_a_plan_survive_a_shell_and_yaml():
    cfg = load_config("configs/h2_256.yaml")
    for path in ("/plans/größte pläne #1.yaml", "/plans/it's.json"):
        line = point_of(cfg)._replace(cache=path).lines(cfg)
        assert load_config("configs/h2_256.yaml", shlex.split(line)[1::2]).sample.cache == path


def test_of_a_plan_that_was_changed_the_last_contents_count():
    rows = [
        {"sampler": "heun", "steps": "4", "guidance_scale": "0", "guidance_interval": "0:1", "precision": "bf16"}
        | {"cache": "p.yaml", "plan": plan, "figure": figure, "seconds": "1"}
        for plan, figure in (("a", "9"), ("a", "9"), ("b", "3"), ("b", "5"))
    ]
    (only,) = summarised(rows)
    assert only.figures == [3.0, 5.0]


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr("uvit_fast.evaluation.classifier.STEPS", 60)
    small = ["model.embed_dim=32", "model.depth=2"]
    cfg = load_config("configs/digits.yaml", small)
    weights = {name: 4 * weight for name, weight in build_model(cfg).state_dict().items()}  # so that layers matter
    save_file(weights, tmp_path / "ema.safetensors")
    sets = [part for text in small for part in ("--set", text)]
    of = ["--config", "configs/digits.yaml", *sets, "--checkpoint", str(tmp_path / "ema.safetensors")]
    reference = ["--reference", "configs/digits.yaml", "--features", "digits-fid", "--cache", str(tmp_path / "cache")]
    return ["front", *of, *reference, "--num", "80", "--batch", "40", "--out", str(tmp_path / "out")]


def rows_of(tmp_path):
    with open(tmp_path / "out" / "points.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_is_measured_continued_and_drawn(command, tmp_path, capsys, monkeypatch):
    """A second command adds points to those that are there, measured once; FP8 and plans that do not fit are named."""
    (tmp_path / "plan.yaml").write_text("steps: 4\nreuse: {2: ['*']}")
    assert cli.main([*command, "--steps", "4,2", "--seeds", "2", "--precisions", "bf16,fp8"]) == 0
    said, first = capsys.readouterr().out, rows_of(tmp_path)
    assert [(row["steps"], row["seed"]) for row in first] == [("4", "0"), ("4", "1"), ("2", "0"), ("2", "1")]
    assert (
        "4 of 4" in said
        and "left" in said
        and "and 1 more: sample.precision=fp8: its kernels" in said
        and "as good" in said
    )
    assert all(float(row["seconds"]) > 0 and row["metric"] == "digits-fid" for row in first)
    assert (tmp_path / "out" / "front.png").read_bytes()[:4] == b"\x89PNG"
    options = ["--steps", "4,2", "--plans", f"none,{tmp_path / 'plan.yaml'}", "--cfg-scales", "1,1.7"]
    assert cli.main([*command, *options, "--intervals", "0:1,0.2:0.8"]) == 0
    said, rows = capsys.readouterr().out, rows_of(tmp_path)
    assert rows[:4] == first and len(rows) == 4 + 7, (
        "unguided, twice guided, of which one is there; planned where it fits"
    )
    assert "a plan of 4 evaluations, got sample.steps 2" in said
    whole, planned = (
        next(
            row
            for row in rows
            if row["steps"] == "4" and row["guidance_scale"] == "0" and (row["cache"] == "none") == none
        )
        for none in (True, False)
    )
    assert whole["figure"] != planned["figure"] and planned["plan"]
    assert summarised(rows)[0].seconds <= summarised(rows)[-1].seconds
    front = (tmp_path / "out" / "front.txt").read_text()
    assert "--set sample.steps=" in front
    monkeypatch.setattr("uvit_fast.measuring.drawn_images", None)  # nothing is left to draw
    assert cli.main([*command, *options, "--intervals", "0:1,0.2:0.8"]) == 0
    (tmp_path / "out" / "front.txt").unlink()
    assert cli.main([*command, "--draw"]) == 0 and (tmp_path / "out" / "front.txt").read_text() == front


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "4,many"], "--steps: expected numbers, as 50,25, got '4,many'"),
        (["--intervals", "0.5"], "--intervals: expected as 0:1,0.1:0.8"),
        (["--samplers", "dpm"], "sample.sampler: expected"),
        (["--plans", "fast"], "expected none, outer:N, outer:N:K"),
        (["--plans", "outer:2:9"], "no point is left to measure: sample.cache outer:2:9"),
        (["--precisions", "fp8"], "no point is left to measure: sample.precision=fp8: its kernels need"),
        (["--num", "1"], "--num: expected at least 2 images"),
        (["--draw"], "no points.csv"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(command, capsys, more, message, tmp_path):
    assert cli.main([*command, *more]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (tmp_path / "out").exists()


def test_points_of_other_settings_do_not_join(command, tmp_path, capsys):
    from uvit_fast.commands.points import Table

    assert Table(tmp_path / "out").claim({"num": 80}) is None
    assert "num 80, got 90" in Table(tmp_path / "out").claim({"num": 90})
    assert "its points are of another model" in Table(tmp_path / "out").claim({"num": 80, "config": "c87ae29"})
    (tmp_path / "out" / "settings.json").write_text("[]")
    assert "settings.json: damaged" in Table(tmp_path / "out").claim({"num": 80})
    assert "expected a new folder" in Table(tmp_path).claim({"num": 80})  # which holds out/
    assert "expected a new folder" in Table(tmp_path / "ema.safetensors").claim({"num": 80})
    (tmp_path / "out" / "points.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="expected what `uvit-fast front` writes"):
        Table(tmp_path / "out").rows()
    row = "heun,4,0,0:1,bf16,none,,0,9,fid,{},1,9,CPU"
    for rows in (row.format("low"), "heun,4", row.format("2").replace("0:1", "all")):
        (tmp_path / "out" / "points.csv").write_text("\ufeff" + ",".join(COLUMNS) + f"\n{row.format('2')}\n{rows}\n")
        with pytest.raises(UserError, match="points.csv: row 2: expected cells as"):
            Table(tmp_path / "out").rows()


def test_the_documented_front_is_what_its_rows_say():
    """The table of docs/front.md, and README's sentence."""
    root = Path(__file__).parent.parent
    text, readme = ((root / name).read_text() for name in ("docs/front.md", "README.md"))
    with open(root / "docs/analyses/fashion_front.csv", newline="") as file:
        points = summarised(csv.DictReader(file))
    found = {
        (each.point.steps, Path(each.point.cache).stem): each
        for each in points
        if each.point.sampler == "dpmpp_2m" and not each.point.scale
    }
    table = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ") and row.endswith(" |")]
    rows = {int(row[0]): row[1:] for row in table if row[0].isdecimal() and len(row) > 4}
    assert rows.keys() == {steps for steps, _ in found}
    for steps, cells in rows.items():
        said = [cell for cell in cells if cell.strip()]
        mine = [
            found[key] for key in ((steps, "none"), (steps, "outer:2"), (steps, f"calibrated_{steps}")) if key in found
        ]
        assert said == [part for each in mine for part in (f"{each.figure:.3f}", f"{each.seconds:.3f} s")]
    (times,) = re.findall(r"([\d.]+) times as fast", as_good(points)[1])
    assert f"{float(times):.1f} times as fast" in text and f"{float(times):.1f} times as fast" in readme
