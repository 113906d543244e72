"""The analysis of objectives: what it compares differs in the objective alone, and the docs show what was measured."""

import csv

import pytest

from benchmarks import objectives


def test_the_docs_table_is_what_the_results_say():
    assert (objectives.DOCS / "training.md").read_text() == objectives.documented(), (
        "run `python -m benchmarks.objectives table`"
    )


def test_the_table_has_mean_and_spread_of_the_seeds_by_data():
    one = dict.fromkeys(objectives.COLUMNS, "1") | {"data": "digits", "device": "CPU", "parameters": "2500000"}
    first, other = list(objectives.OBJECTIVES)[:2]
    rows = [one | {"objective": first, "seed": str(seed), "figure": str(figure)} for seed, figure in enumerate((1, 3))]
    rows.append(one | {"objective": other, "data": "fashion_mnist", "figure": "2.5"})
    text = objectives.table(rows)
    said = text.replace("\n", " ")
    assert f"| {first} | 2.00 ± 1.41 | – |" in text and f"| {other} | – | 2.50 |" in text
    assert "digits: 2.50 M parameters" in said and "2 seeds, CPU" in said


@pytest.mark.parametrize("data", objectives.SETTINGS)
def test_objectives_differ_in_what_they_ask_for_alone(data):
    configs = [objectives.config(data, [], name, seed=3) for name in objectives.OBJECTIVES]
    assert len({cfg.diffusion for cfg in configs}) == len(objectives.OBJECTIVES)
    assert len({cfg.model_copy(update={"diffusion": None}).model_dump_json() for cfg in configs}) == 1
    assert configs[0].train.seed == 3 and configs[0].sample.guidance_scale == 0


def test_a_run_goes_on_where_its_file_ends(tmp_path, monkeypatch):
    """What is measured stays, and is not measured again."""
    asked = []

    class Here:  # a pool whose one worker is this process
        __init__ = __exit__ = lambda self, *args, **options: None
        __enter__ = lambda self: self  # noqa: E731

        def submit(self, function, *args):
            future = objectives.concurrent.futures.Future()
            future.set_result(function(*args))
            return future

    def measure(cfg, name, samples, cache):
        asked.append((name, cfg.train.seed))
        values = {"data": "digits", "objective": name, "seed": cfg.train.seed, "figure": "1", "seconds": "2"}
        return dict.fromkeys(objectives.COLUMNS, "0") | values

    monkeypatch.setattr(objectives.concurrent.futures, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(objectives, "measure", measure)
    monkeypatch.setattr(objectives, "fit", lambda cfg, cache: None)
    out = tmp_path / "x.csv"
    for seeds in ("1", "2"):
        monkeypatch.setattr("sys.argv", ["objectives", "digits", "--out", str(out), "--seeds", seeds])
        objectives.main()
    assert asked == [(name, seed) for seed in (0, 1) for name in objectives.OBJECTIVES]
    with open(out, newline="") as file:
        assert len(list(csv.DictReader(file))) == len(asked)
