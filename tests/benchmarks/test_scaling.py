"""What the scaling benchmark makes of what it saw."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.bench_scaling import count, scaling
from benchmarks.common import Rows
from benchmarks.communication import calculate, shares


def test_communication_is_exposed_where_nothing_else_runs():
    """Two collectives, the first half hidden, the second hidden whole; a gap in which the device idles."""
    found = shares([(0, 4), (6, 8)], [(2, 9), (10, 20)])
    assert found == pytest.approx({"comm_share": 6 / 20, "exposed_share": 2 / 20, "idle_share": 1 / 20})


def test_the_calculation_grows_what_is_exposed_and_nothing_else():
    """Of a step of 110 ms on two GPUs 10% are exposed: 11 ms, of which a ring of eight makes 7/8 over 1/2 as much."""
    assert calculate(8, 2, 95.0, 110.0, 0.1) == pytest.approx(99 + 11 * 1.75)
    assert calculate(2, 2, 95.0, 110.0, 0.1) == pytest.approx(110)
    assert calculate(4, 2, 100.0, 99.0, 0.0) == 100.0  # never faster than one GPU's own step


def answers(stage: int, last_loss: float) -> list[dict]:
    """Two ranks whose step takes 110 ms, 10% of it exposed communication on the slower one."""
    common = {
        "gpus": 2,
        "stage": stage,
        "policy": "block",
        "times": [110.0] * 5,
        "losses": [1.0, last_loss],
        "comm_bytes": {"allreduce": 10**9},
    }
    return [
        common
        | {"peak_gb": 12 + i, "static_gb": 6, "comm_share": 0.2, "exposed_share": 0.05 * (i + 1), "idle_share": 0}
        for i in range(2)
    ]


@pytest.mark.parametrize(("loss", "complaints"), [(0.9001, 0), (0.95, 1), (float("nan"), 1)])
def test_what_is_calculated_is_marked_and_losses_that_differ_are_named(loss, complaints, tmp_path):
    each = [
        {"gpus": 1, "stage": 2, "policy": "block", "times": [t] * 5, "losses": [1.0, 0.9]} for t in (95.0, 100.0, 104.0)
    ]
    args = SimpleNamespace(device="cuda", batch=128, also="4,8")
    rows = Rows("scaling", tmp_path)
    assert len(scaling(rows, args, [answers(1, 0.9), answers(2, loss)], each)) == complaints
    found = {(row["case"], row["provider"], row["metric"]): float(row["p50"]) for row in rows.rows}
    assert found["H:256:zero1:2gpu:block", "ours", "speedup"] == pytest.approx(200 / 110, rel=1e-5)
    assert found["H:256:zero1:2gpu:block", "ours", "peak_gb"] == 13
    assert found["H:1024:zero1:8gpu:block", "calculated", "speedup"] == pytest.approx(800 / 119.25, rel=1e-5)
    assert found["H:1024:zero1:8gpu:block", "calculated", "over_paper"] == pytest.approx(1e3 / 119.25 / 0.668, rel=1e-5)
    assert all(provider == "calculated" for case, provider, _ in found if ":4gpu:" in case or ":8gpu:" in case)


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
