"""The ops' benchmark measures the providers that it is asked for, each as its name says."""

import sys

import pytest
import torch

from benchmarks import bench_ops
from uvit_fast.kernels.gemm import fp8, sm90_fp8
from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.ops import fp8_block


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """On the CPU, few tokens, PyTorch's arithmetic for the kernels; a call takes a millisecond. Returns the rows."""

    def times(call, **how):
        call()
        return [1.0]

    def measured(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench", "--dims", "64", "--out", str(tmp_path), *arguments])
        bench_ops.main()
        lines = (tmp_path / "ops.csv").read_text().splitlines()[1:]
        return {tuple(line.split(",")[6:9]) for line in lines}

    monkeypatch.setattr(bench_ops, "times", times)
    monkeypatch.setattr(bench_ops, "TOKENS", 64)
    monkeypatch.setattr(bench_ops, "random", lambda *shape: torch.randn(*shape, dtype=torch.bfloat16))
    monkeypatch.setattr(bench_ops, "need_gpu", lambda parser: None)
    monkeypatch.setattr(bench_ops.Rows, "ceilings", lambda rows: None)
    monkeypatch.setattr(fp8_block, "why_not", lambda *_: None)
    monkeypatch.setattr(sm90_fp8, "product", fp8.reference)
    monkeypatch.setattr(fold, "statistics", lambda x: fp8_block.REFERENCE.statistics(x, None))
    return measured


def test_each_product_runs_in_fp8_with_its_epilogue(run):
    names = ("ln_linear", "ln_mlp", "skip_linear", "linear_residual")
    rows = run("--ops", *names, "--providers", "ours-fp8", "eager", "cublas")
    parts = {"eager": ("fwd", "bwd"), "cublas": ("fwd", "bwd"), "ours-fp8": ("fwd",)}
    assert rows == {
        (f"{name}:{part}:64", who, "fp8" if who == "ours-fp8" else "bf16")
        for name in names
        for who in parts
        for part in parts[who]
    }


def test_a_provider_that_is_not_asked_for_is_not_run(run, monkeypatch):
    for name in ("in_fp8", "plain_products", "backward_of", "Block"):
        monkeypatch.setattr(bench_ops, name, lambda *_: pytest.fail("run"))
    rows = run("--ops", "linear_residual", "block", "--providers", "cublas")
    assert {row[:2] for row in rows} == {(f"linear_residual:{part}:64", "cublas") for part in ("fwd", "bwd")}
