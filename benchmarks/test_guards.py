"""The deterministic guards, without a GPU: `pytest benchmarks --benchmark-only`. The times are the guards' own."""

import warnings

import pytest
import torch

from benchmarks import guards
from tests.kernels import test_attention, test_contracts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, test_throughput.py measures instead")


@pytest.mark.parametrize("case", guards.CASES)
def test_launches_saved_bytes_and_waits(benchmark, case):
    now = benchmark.pedantic(guards.CASES[case], rounds=1, iterations=1)
    baseline = guards.read_baseline()
    same = baseline["versions"] == guards.versions()
    worse = guards.complaints(case, baseline[case], now, same)
    if not worse and guards.complaints(case, now, baseline[case], same):
        warnings.warn(f"{case}: better than its baseline; python -m benchmarks.guards --write keeps that", stacklevel=1)
    assert not worse, "\n".join([*worse, "if that is what it takes: python -m benchmarks.guards --write"])


@pytest.mark.parametrize("arch", [80, 90])
def test_contract_of_the_linear_kernels(benchmark, arch):
    check = test_contracts.test_every_kernel_takes_what_its_contract_says
    benchmark.pedantic(check, args=(arch,), rounds=1, iterations=1)


def test_contract_of_the_attention_kernels(benchmark):
    check = test_attention.test_the_kernels_keep_their_resource_contract
    benchmark.pedantic(check, rounds=1, iterations=1)
