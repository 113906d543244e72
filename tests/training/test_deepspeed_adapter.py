"""DeepSpeed, whose versions differ: the oldest and the newest that are asked for train alike, and one without what is
replaced runs its own step.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch.nn.functional as F
from packaging.requirements import Requirement

from tests.training import tiny
from tests.training.test_trainer import config
from uvit_fast.runtime.errors import UserError
from uvit_fast.training import deepspeed_adapter
from uvit_fast.training.deepspeed_adapter import TESTED

ROOT = Path(__file__).parents[2]
STEPS = 3
WAYS = {  # each with a ZeRO optimizer of its own, or a way through it
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "bf16": {"zero_stage": 2, "precision": "bf16"},  # accumulated in one flat partition, in newer versions
    "frozen": {"zero_stage": 2, "trainable": ("blocks", "last")},
    "zero3": {"zero_stage": 3},
    "offload": {"zero_stage": 2, "offload_optimizer": True},
}


def versions_asked_for() -> Requirement:
    listed = re.findall(r'"(deepspeed[^"]*)"', (ROOT / "setup.py").read_text())
    return Requirement(listed[0])


def test_setup_asks_for_the_versions_that_are_tested():
    """And the suite's own is the newest of them."""
    asked = versions_asked_for().specifier
    assert all(version in asked for version in TESTED)
    assert "0.18.9" not in asked and "0.20.0" not in asked
    assert f"deepspeed=={TESTED[1]}" in (ROOT / "constraints.txt").read_text().split()


@pytest.fixture(scope="module")
def oldest(pytestconfig) -> Path:
    """A folder with the oldest version, which is built there once: some seconds."""
    folder = pytestconfig.cache.mkdir("deepspeed") / TESTED[0]
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
        command += ["--target", str(partial), f"deepspeed=={TESTED[0]}"]
        done = subprocess.run(command, env={**os.environ, "DS_BUILD_OPS": "0"}, capture_output=True, text=True)
        if done.returncode and "CI" not in os.environ:
            pytest.skip(f"deepspeed {TESTED[0]} could not be had: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr[-2000:]
        partial.rename(folder)
    return folder


def curves(folder: Path) -> dict[str, list[float]]:
    """The losses of a few steps of each of WAYS, in this process; all but ZeRO-3 and the offloaded optimizer in one
    pass. None of them changes how other networks in the process compute.
    """
    found, linear = {}, F.linear
    for way, train in WAYS.items():
        run = tiny.trainer(folder / way, config(iterations=STEPS, **train))
        assert run.engine.deepspeed.fused == (way not in ("zero3", "offload"))
        assert F.linear is linear, way
        run.train()
        assert F.linear is linear, way
        run.engine.close()
        rows = (folder / way / "metrics.jsonl").read_text().splitlines()
        found[way] = [json.loads(row)["loss"] for row in rows]
    return found


def test_the_oldest_version_trains_as_the_newest_does(oldest, tmp_path):
    """To the bit, on a CPU; of bf16, whose gradients the versions accumulate in other places, to its three digits."""
    code = (
        "import sys, json, pathlib, deepspeed; from tests.training import test_deepspeed_adapter as here; "
        "print(json.dumps([deepspeed.__version__, here.curves(pathlib.Path(sys.argv[1]))]))"
    )
    path = os.pathsep.join([str(oldest), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "oldest")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    version, losses = json.loads(done.stdout.splitlines()[-1])
    assert version == TESTED[0]
    newest = tiny.launch(curves, tmp_path / "newest")
    assert losses.pop("bf16") == pytest.approx(newest.pop("bf16"), rel=1e-3)
    assert losses == newest


def rename(name: str) -> None:
    """As a newer version may: what ZeRO 1 and 2 use still works, but under another name."""
    from deepspeed.runtime import utils
    from deepspeed.runtime.zero import stage_1_and_2

    if hasattr(utils, name):  # who uses it has it already
        delattr(utils, name)
    else:
        source = inspect.getsource(stage_1_and_2).replace(name, f"{name}_2")
        exec(compile(source, stage_1_and_2.__file__, "exec"), vars(stage_1_and_2))
        sys.modules["deepspeed.runtime.engine"].DeepSpeedZeroOptimizer = stage_1_and_2.DeepSpeedZeroOptimizer


def with_another_name(run_dir, cfg, name):
    """What is warned of, whether the step is one pass, and the run."""
    rename(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        run = tiny.trainer(run_dir, cfg)
        run.train()
    said = [str(w.message) for w in caught if "deepspeed" in str(w.message)]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return said, run.engine.deepspeed.fused, [row["loss"] for row in rows], run.engine.gather(run.engine.ema.values)


@pytest.mark.parametrize(
    "name, ranks", [("buffered_reduce_fallback", 1), ("averaged_gradients", 2), ("all_gather_dp_groups", 2)]
)
def test_a_version_without_what_is_replaced_runs_its_own_step(name, ranks, tmp_path):
    """What is replaced, read, and called: the same losses and averages, after one line."""
    cfg = config(iterations=6)
    said, fused, losses, ema = tiny.launch(with_another_name, tmp_path / "renamed", cfg, name, ranks=ranks)
    assert len(said) == 1 and not fused
    assert re.fullmatch(rf"deepspeed {TESTED[1]} has no [\w.]+\.{name}, .*its own step runs, which is slower", said[0])
    ours = tiny.launch(tiny.train, tmp_path / "ours", cfg, ranks=ranks)
    assert losses == pytest.approx(ours["losses"], rel=1e-5)
    assert all(ema[key].allclose(value, rtol=1e-5, atol=1e-6) for key, value in ours["ema"].items())


def refused(run_dir, name):
    rename(name)
    try:
        tiny.trainer(run_dir, config())
    except UserError as error:
        return str(error)


def test_a_version_without_what_nothing_replaces_is_refused(tmp_path):
    message = tiny.launch(refused, tmp_path, "update_lp_params")
    expected = f"deepspeed {TESTED[1]}: expected DeepSpeedZeroOptimizer.update_lp_params in its ZeRO-2 optimizer"
    assert message == f"{expected}; versions {TESTED[0]} to {TESTED[1]} have it"


def test_whatever_is_used_of_the_optimizer_is_looked_for_at_the_start():
    tree = ast.parse(inspect.getsource(deepspeed_adapter))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == "zero") or getattr(node.value, "attr", "") == "_zero"
        )
    }
    known = {*deepspeed_adapter.REPLACED, *deepspeed_adapter.READ, *deepspeed_adapter.PARTITIONS.values()}
    known |= {name for needed in deepspeed_adapter.NEEDED.values() for name in needed}
    assert names <= known and "averaged_gradients" in names
