"""The comparison with a baseline: a real loss of 5% fails, a slower card or a noisy neighbour does not. Simulated
rounds.
"""

import random

import pytest
import torch

from benchmarks import regression
from benchmarks.regression import Times, compare, summary
from uvit_fast.kernels.layers import Norm

WAS, PRODUCTS = Times(product=1.4, copy=0.7, case=1.0), 0.7


def simulated(seed, loss=1.0, product=1.0, copy=1.0, disturbed=0.0):
    """Measures of 40 rounds with 1% of jitter. `disturbed`: the share of moments in which a neighbour takes up to two
    thirds.
    """
    rng = random.Random(seed)

    def took(milliseconds):
        slowed = rng.uniform(1, 3) if rng.random() < disturbed else 1
        return milliseconds * rng.gauss(1, 0.01) * slowed

    def measure():
        case = WAS.case * loss * (PRODUCTS * product + (1 - PRODUCTS) * copy)
        rows = [(took(WAS.product * product), took(WAS.copy * copy), took(case)) for _ in range(40)]
        return summary(rows)

    return measure


@pytest.mark.parametrize("disturbed", [0.0, 0.4], ids=["quiet", "neighbour"])
def test_a_real_loss_of_five_percent_always_fails(disturbed):
    for seed in range(100):
        assert compare("ln_mlp", WAS, PRODUCTS, simulated(seed, loss=1.05, disturbed=disturbed)).lost


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"disturbed": 0.4},  # a neighbour, two moments in five
        {"product": 1.15, "copy": 1.15},  # lower clocks
        {"product": 1.3},  # a power limit, which spares the memory
        {"copy": 1.2},  # slower memory
        {"loss": 0.8},  # faster
    ],
    ids=["the same", "neighbour", "clocks", "power", "memory", "gain"],
)
def test_what_is_no_loss_of_the_code_never_fails(how):
    for seed in range(100):
        assert compare("ln_mlp", WAS, PRODUCTS, simulated(seed, **how)).lost is None


def test_a_neighbour_that_stays_for_a_whole_measurement_is_forgiven_when_it_has_left():
    measures = iter([simulated(0, loss=1.5), simulated(1), None])
    assert compare("ln_mlp", WAS, PRODUCTS, lambda: next(measures)()).lost is None


def test_the_complaint_names_case_was_and_now():
    text = compare("ln_mlp forward", WAS, PRODUCTS, lambda: Times(1.4 * 1.1, 0.7, 1.07 * 1.2)).lost
    assert text.startswith("ln_mlp forward: was 1 ms, now 1.284 ms, +20.0% beyond")
    assert "matrix product (+10.0%) and copy (+0.0%)" in text


def test_rounds_are_timed_one_by_one_and_calls_are_divided():
    """On the CPU's clock, with a case that sleeps: the quantile is of one call."""
    import time

    yard = regression.Yard("cpu", side=16, elements=16)
    times = yard.measure(lambda: time.sleep(0.002), calls=2, rounds=4)
    assert 2 <= times.case < 2 * 2 and max(times.product, times.copy) < times.case


def test_an_op_of_layers_and_of_two_results_has_its_backward():
    def op(x, norm):
        return x * norm.weight + norm.bias, None

    run = regression._with_backward(op, (torch.ones(2, 3), Norm(torch.ones(3), torch.zeros(3))))
    assert [tuple(g.shape) for g in run()] == [(2, 3), (3,), (3,)]
