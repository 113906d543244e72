"""Plans of cached layers are timed as what they are called."""

import functools

import pytest

from benchmarks import bench_cached, bench_sampling, models
from benchmarks.common import Rows
from benchmarks.results import Results
from tests.recorded import RecordedGraphs
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model.cached import sublayers
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.sampling.captured import GraphSampler

TINY = ["model.embed_dim=64", "model.num_heads=1", "model.depth=4", "model.img_size=4"]


@pytest.mark.parametrize(
    ("plan", "whole", "reused"),
    [("none", 50, 0), ("alternate", 26, 10), ("learned", 26, 6), ("three-of-four", 14, 10), ("outer:3", 17, 6)],
)
def test_a_plan_reuses_what_it_says(plan, whole, reused):
    stages = bench_cached.planned(models.config("H", "ours", overrides=TINY), plan).stages
    found = [len(stage.layers.reuse) if stage.layers else 0 for stage in stages]
    assert len(found) == 50 and found.count(0) == pytest.approx(whole, abs=2) and max(found) == reused
    assert not found[0] and len(sublayers(4)) == 10 and (not found[-1] or plan == "outer:3")


@pytest.mark.parametrize("provider", ["ours", "ours-fp8"])
def test_a_case_is_a_captured_loop_of_500_samples(provider, tmp_path, monkeypatch):
    def measure(run, repeats, warmup):
        run()
        return [1000.0]

    monkeypatch.setattr(bench_sampling, "measure", measure)
    monkeypatch.setattr(bench_cached, "STEPS", 5)
    monkeypatch.setattr(models, "Fp8UViT", functools.partial(Fp8UViT, by=fp8_block.REFERENCE))
    cfg, rows, graphs = models.config("S", provider, overrides=TINY), Rows("cached", tmp_path), RecordedGraphs()
    bench_cached.bench(
        rows, "S:2:outer:2", provider, cfg, GraphSampler(models.model(cfg, provider, "cpu"), graphs=graphs)
    )
    rows.write()
    found = Results(tmp_path)
    assert graphs.captures == 1 and found.value("cached", "S:2:outer:2", provider, "time") == 250
    assert 0 < found.value("cached", "S:2:outer:2", provider, "reused") < 60
