"""Each guard of benchmarks/guards.py sees a regression that is planted: a kernel, a saved tensor, a wait,
a register.
"""

import json
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from benchmarks import guards
from tests.kernels import test_contracts
from tests.training import tiny
from uvit_fast.kernels.layernorm import fold
from uvit_fast.model.uvit import Block
from uvit_fast.training.engine import Engine

FORWARD = "s2_coco forward"
TRAINING = "s2_coco forward and backward, checkpointing none"
SAMPLING = f"s2_coco sampling, {guards.EVALUATIONS} guided evaluations"


@pytest.fixture(scope="module")
def was():
    """Figures of the code as it is, by case."""
    return {case: guards.CASES[case]() for case in (FORWARD, TRAINING, SAMPLING)}


def with_block(change):
    """Every block's forward followed by `change`."""
    plain = Block.forward

    def forward(self, *inputs, hand_on=False):
        x, sums = plain(self, *inputs, hand_on=True)
        return (change(x), sums) if hand_on else change(x)

    return mock.patch.object(Block, "forward", forward)


def test_an_extra_kernel_is_seen_and_named(was):
    with with_block(lambda x: x + 1):
        worse = guards.complaints(FORWARD, was[FORWARD], guards.CASES[FORWARD]())
    launches, adds = was[FORWARD]["launches"], was[FORWARD]["kernels"].get("aten::add.Tensor", 0)
    change = f"aten::add.Tensor {adds} -> {adds + 13}"
    assert worse == [f"{FORWARD}: launches: was {launches}, now {launches + 13} ({change})"]


def test_an_extra_launch_inside_a_fused_op_is_seen(was):
    """Out of the dispatcher's sight: the weight's fold computed twice."""
    plain = fold.prepare
    with mock.patch.object(fold, "prepare", lambda *a, **k: (plain(*a, **k), plain(*a, **k))[1]):
        worse = guards.complaints(FORWARD, was[FORWARD], guards.CASES[FORWARD]())
    folds = was[FORWARD]["kernels"]["triton:prepare_kernel"]
    assert f"triton:prepare_kernel {folds} -> {2 * folds}" in worse[0]


def test_a_saved_tensor_is_seen(was):
    with with_block(lambda x: x * torch.sigmoid(x)):  # keeps both factors
        worse = guards.complaints(TRAINING, was[TRAINING], guards.CASES[TRAINING](), same_versions=False)
    kept, a_tensor = was[TRAINING]["saved_bytes"], 128 * 334 * 512 * 2
    assert worse == [f"{TRAINING}: bytes kept for the backward: was {kept:,}, now {kept + 2 * 13 * a_tensor:,}"]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x * x.max().item(),
        lambda x: x if x.isfinite().all() else x,
        lambda x: x[x[:, 0, 0] > 0],
        lambda x: x * torch.tensor(2.0, device=x.device),
        lambda x: x + torch.zeros(x.shape[-1]).to(x),
    ],
    ids=["item", "if", "mask", "upload of a number", "pageable copy"],
)
def test_a_wait_in_the_sampling_loop_is_seen_and_placed(was, wait):
    with with_block(wait):
        worse = guards.complaints(SAMPLING, was[SAMPLING], guards.CASES[SAMPLING]())
    assert "the host waits for the device at tests/benchmarks/test_guards.py:" in worse[0]


def read_ema(stack: ExitStack) -> None:
    plain = Engine.step

    def step(self, lr):
        plain(self, lr * float(self.ema.values[0].item() > -1e30))

    stack.enter_context(mock.patch.object(Engine, "step", step))


def test_a_wait_in_the_training_step_is_seen_and_placed():
    tiny.prepared()
    case, now = "digits training step", guards.training_step(read_ema)
    worse = guards.complaints(case, guards.read_baseline()[case], now, same_versions=False)
    assert len(worse) == 1 and "_local_scalar_dense (1 times)" in worse[0]
    assert worse[0].startswith(f"{case}: the host waits for the device at tests/benchmarks/test_guards.py:")


def test_a_kernel_that_takes_more_than_its_contract_is_seen(tmp_path, monkeypatch):
    """Column sums on half the warps: twice the registers a thread."""
    contract = json.loads(test_contracts.CONTRACT.read_text())
    contract["sm_80"] = {"column_sums": contract["sm_80"]["column_sums"]}
    short = tmp_path / "linear.json"
    short.write_text(json.dumps(contract))
    table, kernels = test_contracts.tuning.table, test_contracts.kernels
    monkeypatch.setattr(test_contracts, "CONTRACT", short)
    monkeypatch.setattr(test_contracts, "kernels", lambda arch: {"column_sums": kernels(arch)["column_sums"]})
    test_contracts.test_every_kernel_takes_what_its_contract_says(80)
    changed = {**table(80), "column_sums": table(80)["column_sums"] | {"warps": table(80)["column_sums"]["warps"] // 2}}
    monkeypatch.setattr(test_contracts.tuning, "table", lambda arch: changed)
    with pytest.raises(AssertionError, match="column_sums on sm_80: registers was"):
        test_contracts.test_every_kernel_takes_what_its_contract_says(80)
