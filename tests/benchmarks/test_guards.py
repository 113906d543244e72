"""Each guard of benchmarks/guards.py sees a regression that is planted: a kernel, a saved tensor, a wait, a register."""

import json
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from benchmarks import guards
from tests.kernels import test_contracts
from uvit_fast.model.uvit import Block
from uvit_fast.training.ema import EMA

CASE = "s2_coco forward and backward, checkpointing none"


@pytest.fixture
def baseline():
    return guards.read_baseline()


def with_block(change):
    """Every block's forward followed by `change`."""
    plain = Block.forward
    return mock.patch.object(Block, "forward", lambda self, *inputs: change(plain(self, *inputs)))


def test_an_extra_kernel_is_seen_and_named(baseline):
    with with_block(lambda x: x + 1):
        case = "s2_coco forward"
        worse = guards.complaints(case, baseline[case], guards.CASES[case]())
    was = baseline[case]["launches"]
    assert len(worse) == 1
    assert worse[0].startswith(f"{case}: launches: was {was}, now {was + 13} (aten::add.Tensor 1 -> 14)")


def test_an_extra_launch_inside_a_fused_op_is_seen(baseline):
    """Out of the dispatcher's sight: the weight's fold computed twice."""
    from uvit_fast.kernels import layernorm

    plain = layernorm.prepare
    with mock.patch.object(layernorm, "prepare", lambda *a: (plain(*a), plain(*a))[1]):
        worse = guards.complaints("s2_coco forward", baseline["s2_coco forward"], guards.forward("s2_coco"))
    assert "triton:prepare_kernel 26 -> 52" in worse[0]


def test_a_saved_tensor_is_seen(baseline):
    with with_block(lambda x: x * torch.sigmoid(x)):  # keeps both factors
        worse = guards.complaints(CASE, baseline[CASE], guards.CASES[CASE](), same_versions=False)
    was, a_tensor = baseline[CASE]["saved_bytes"], 128 * 334 * 512 * 2
    assert worse == [f"{CASE}: bytes kept for the backward: was {was:,}, now {was + 2 * 13 * a_tensor:,}"]


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
def test_a_wait_in_the_sampling_loop_is_seen_and_placed(baseline, wait):
    case = "s2_coco sampling, 5 guided evaluations"
    with with_block(wait):
        now = guards.CASES[case]()
    worse = guards.complaints(case, baseline[case], now)
    assert "the host waits for the device at tests/benchmarks/test_guards.py:" in worse[0]


def read_ema(stack: ExitStack) -> None:
    plain = EMA.update

    def update(self, weights, refused):
        plain(self, weights, refused * float(self.values[0].item() > -1e30))

    stack.enter_context(mock.patch.object(EMA, "update", update))


def test_a_wait_in_the_training_step_is_seen_and_placed(baseline):
    case = "digits training step"
    now = guards.training_step(read_ema)
    worse = guards.complaints(case, baseline[case], now)
    assert worse[0].startswith(f"{case}: the host waits for the device at tests/benchmarks/test_guards.py:")
    assert "_local_scalar_dense (1 times)" in worse[0]
    assert "launches: was" in worse[1]  # the product that came with it


def test_a_kernel_that_takes_more_than_its_contract_is_seen(tmp_path, monkeypatch):
    """Column sums on half the warps: twice the registers a thread."""
    contract = json.loads(test_contracts.CONTRACT.read_text())
    contract["sm_80"] = {"column_sums": contract["sm_80"]["column_sums"]}
    short = tmp_path / "linear.json"
    short.write_text(json.dumps(contract))
    table, kernels = test_contracts.launch.table, test_contracts.kernels
    monkeypatch.setattr(test_contracts, "CONTRACT", short)
    monkeypatch.setattr(test_contracts, "kernels", lambda arch: {"column_sums": kernels(arch)["column_sums"]})
    test_contracts.test_every_kernel_takes_what_its_contract_says(80)
    changed = {**table(80), "column_sums": table(80)["column_sums"] | {"warps": table(80)["column_sums"]["warps"] // 2}}
    monkeypatch.setattr(test_contracts.launch, "table", lambda arch: changed)
    with pytest.raises(AssertionError, match="column_sums on sm_80: registers was"):
        test_contracts.test_every_kernel_takes_what_its_contract_says(80)
