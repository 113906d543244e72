"""A profile shares out the time of a step: nothing twice, nothing lost."""

import csv
import gzip
import json
import subprocess
import sys

import pytest

from uvit_fast.profiling import ORDER, breakdown, family


def event(name, begin, end, cat="kernel", tid=7):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid}


def shares(events, steps=1):
    return {row.family: (row.ms * 1e3, row.calls) for row in breakdown({"traceEvents": events}, steps)}


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("gemm_kernel", "linear"),
        ("weight_gradient_kernel", "linear"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "linear"),
        ("void at::native::im2col_kernel / implicit_convolve_sgemm", "linear"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "linear"),
        ("attention_forward_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("_prepare_kernel", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, sum_functor>>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
    ],
)
def test_families(name, wanted):
    assert family(name) == wanted


def test_kernels_on_a_gpu_share_out_the_time_and_communication_counts_where_nothing_else_runs():
    events = [
        event("aten::linear", 0, 900, cat="cpu_op"),  # the host's, which does not count on a GPU
        event("gemm_kernel", 100, 200),
        event("attention_forward_kernel", 200, 250),
        event("ncclDevKernel_ReduceScatter", 220, 300, tid=20),  # 30 of it hidden behind attention
        event("vectorized_elementwise_kernel", 310, 330),
        event("optimizer", 340, 400, cat="gpu_user_annotation"),
        event("vectorized_elementwise_kernel", 350, 390),
    ]
    found = shares(events)
    assert found == {
        "linear": (100, 1),
        "attention": (50, 1),
        "elementwise": (20, 1),
        "optimizer": (40, 1),
        "communication": (50, 1),
        "idle": (30, 0),
    }
    assert shares(events, steps=2)["linear"] == (50, 0.5)


def test_an_op_of_the_host_counts_without_the_ops_that_it_calls():
    events = [
        event("aten::gelu", 0, 100, cat="cpu_op"),
        event("aten::linear", 20, 60, cat="cpu_op"),
        event("aten::softmax", 30, 50, cat="cpu_op"),
        event("aten::copy_", 70, 80, cat="cpu_op"),
        event("aten::addmm", 120, 130, cat="cpu_op"),
    ]
    found = shares(events)
    assert {kind: ms for kind, (ms, _) in found.items() if ms} == {
        "linear": 20 + 10, "attention": 20, "elementwise": 20 + 10 + 20 + 10, "idle": 20,
    }  # fmt: skip


def test_the_command_writes_traces_and_tables_of_both(pytestconfig, tmp_path):
    command = [
        sys.executable,
        "-m",
        "uvit_fast.cli",
        "profile",
        "--config",
        "configs/digits.yaml",
        "--out",
        str(tmp_path),
    ]
    command += ["--batch", "2", "--steps", "1", "--set", "sample.steps=2", "--set", "device=cpu"]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for what in ("training", "sampling"):
        with gzip.open(tmp_path / f"{what}.json.gz", "rt") as file:
            assert json.load(file)["traceEvents"]
        with open(tmp_path / f"{what}.csv") as file:
            rows = {row["family"]: row for row in csv.DictReader(file)}
        assert list(rows) == ORDER and sum(float(row["share"]) for row in rows.values()) == pytest.approx(1, abs=1e-3)
        assert float(rows["linear"]["ms"]) > 0 and float(rows["attention"]["ms"]) > 0
        assert (float(rows["optimizer"]["calls"]) > 0) == (what == "training")
        assert what in done.stdout
