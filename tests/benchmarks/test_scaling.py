"""What the scaling benchmark makes of what it saw."""

import numpy as np
import pytest

from benchmarks.bench_scaling import calculate, count, shares


def test_communication_is_exposed_where_nothing_else_runs():
    """Two collectives, the first half hidden, the second hidden whole; a gap in which the device idles."""
    found = shares([(0, 4), (6, 8)], [(2, 9), (10, 20)])
    assert found == {"comm_share": pytest.approx(6 / 20), "exposed_share": pytest.approx(2 / 20)}


def test_the_calculation_grows_what_is_exposed_and_nothing_else():
    """Of a step of 110 ms on two GPUs 10% are exposed: 11 ms, of which a ring of eight makes 7/8 over 1/2 as much."""
    assert calculate(8, 2, 95.0, 110.0, 0.1) == pytest.approx(99 + 11 * 1.75)
    assert calculate(2, 2, 95.0, 110.0, 0.1) == pytest.approx(110)
    assert calculate(4, 2, 100.0, 99.0, 0.0) == 100.0  # never faster than one GPU's own step


@pytest.mark.parametrize(("changed", "expected"), [(lambda x: x, (0, 0)), (lambda x: x[1:], (1, 0))])
def test_missing_images_are_counted(changed, expected, tmp_path):
    images = np.arange(10 * 4 * 4 * 3, dtype=np.uint16).astype(np.uint8).reshape(10, 4, 4, 3)
    np.savez(tmp_path / "samples.npz", changed(images))
    assert count(tmp_path / "samples.npz", 10) == expected


def test_an_image_that_is_there_twice_is_counted(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    images[7] = images[2]
    np.savez(tmp_path / "samples.npz", images)
    assert count(tmp_path / "samples.npz", 10) == (0, 1)
