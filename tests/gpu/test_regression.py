"""The throughput comparison on a GPU: a planted loss of 6% is found, an unchanged case is not, nor one beside a
neighbour.
"""

import pytest
import torch

from benchmarks import regression

pytestmark = pytest.mark.gpu

NAME = "ln_mlp forward"


@pytest.fixture(scope="module")
def measured():
    """A yard, the case's call, and its times in this run."""
    yard, case = regression.Yard(), regression.CASES[NAME]
    run = case.make()
    run()
    return yard, run, yard.measure(run, case.calls, case.rounds)


def compared(measured, run):
    yard, _, was = measured
    case = regression.CASES[NAME]
    return regression.compare(NAME, was, case.products, lambda: yard.measure(run, case.calls, case.rounds))


def test_an_unchanged_case_passes(measured):
    verdict = compared(measured, measured[1])
    assert verdict.lost is None, verdict.lost


def test_a_planted_loss_of_six_percent_is_found(measured):
    yard, run, was = measured
    source = torch.zeros(2**26, device="cuda")
    target = torch.empty_like(source)
    share = 0.06 * was.case / (was.copy / yard.source.numel())  # elements whose copy takes 6% of the case
    wasted = source[: int(share)], target[: int(share)]

    def slower():
        run()
        wasted[1].copy_(wasted[0])

    verdict = compared(measured, slower)
    assert verdict.lost and 1.03 < verdict.ratio < 1.15, verdict


def test_a_neighbour_in_every_third_round_is_no_loss(measured):
    """Matrix products on another stream, which take multiprocessors away while they last."""
    yard, run, _ = measured
    stream, rounds = torch.cuda.Stream(), 0
    case = regression.CASES[NAME]

    def disturbed():
        nonlocal rounds
        rounds += 1
        if rounds // case.calls % 3 == 0 and rounds % case.calls == 0:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    yard.a @ yard.b
        run()

    verdict = compared(measured, disturbed)
    assert verdict.lost is None, verdict.lost
