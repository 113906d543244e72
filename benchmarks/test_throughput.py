"""Nothing is 5% slower than this GPU's baseline: `pytest benchmarks --benchmark-only`.
`python -m benchmarks.regression --write` writes the baseline.
"""

import pytest
import torch

from benchmarks import regression

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; test_guards.py runs without one")


@pytest.fixture(scope="module")
def yard():
    return regression.Yard()


@pytest.mark.parametrize("name", regression.CASES)
def test_no_case_is_slower_than_its_baseline(benchmark, yard, name):
    baseline = regression.read_baseline()
    if name not in baseline:
        pytest.skip(f"{regression.baseline_path().name} has no such case; python -m benchmarks.regression --write")
    measure, products = regression.measurement(name, yard), regression.CASES[name].products
    args = (name, baseline[name], products, measure)
    verdict = benchmark.pedantic(regression.compare, args=args, rounds=1, iterations=1)
    benchmark.extra_info.update(was_ms=baseline[name].case, now_ms=verdict.now.case, ratio=verdict.ratio)
    assert verdict.lost is None, verdict.lost
