"""Sums over the tokens in fp32, in a fixed order: bias gradients, and the partial sums of a kernel's programs.

Plain Triton, for every architecture. Memory-bound: each kernel reads its input once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.launch import cdiv


@triton.jit
def _totals_kernel(
    partial,  # (P, ..., D) fp32, first index `stride` apart
    first,  # (D,)
    second,  # (D,)
    third,  # (D,)
    P,
    stride,
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < P)[:, None] & (col < D)[None, :]
        total += tl.load(partial + row[:, None] * stride + which * D + col[None, :], mask=mask, other=0.0)
    out = first
    if which == 1:
        out = second
    if which == 2:
        out = third
    tl.store(out + col, tl.sum(total, axis=0).to(first.dtype.element_ty), mask=col < D)


def totals(partial: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Add up the programs' partial sums in a fixed order, cast once, in one launch.

    Args:
        partial: (P, D) or (P, at least count, D), fp32.
        count: how many sums, at most 3.

    Returns:
        `count` tensors (D,) of `dtype`: partial[:, 0], partial[:, 1], ... over P.
    """
    P, D = partial.shape[0], partial.shape[-1]
    sums = tuple(partial.new_empty(D, dtype=dtype) for _ in range(count))
    args = (partial, *sums, *sums[:1] * (3 - count), P, partial.stride(0), D)
    options = {"ROWS": 128, "BLOCK": 32, "num_warps": 4}
    launch.run(partial.device, _totals_kernel, (cdiv(D, 32), count), args, options)
    return sums


@triton.jit
def _column_sums_kernel(
    x,  # (M, N)
    partial,  # (programs of axis 0, N) fp32
    M,
    N,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & (col < N)[None, :]
        total += tl.load(x + row.to(tl.int64)[:, None] * N + col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0) * N + col, tl.sum(total, axis=0), mask=col < N)


def column_sums(x: Tensor) -> Tensor:
    """Return sums over the tokens of x (M, N), accumulated in fp32, in x's dtype: a bias gradient. Deterministic."""
    M, N = x.shape
    tuned = tuning.choice(x.device, "column_sums", N)
    programs = min(cdiv(M, tuned["rows"]), tuned["programs"])
    partial = x.new_empty(programs, N, dtype=ACCUMULATE)
    args = (x, partial, M, N)
    options = {"ROWS": tuned["rows"], "BLOCK": tuned["block"], "num_warps": tuned["warps"]}
    launch.run(x.device, _column_sums_kernel, (programs, cdiv(N, tuned["block"])), args, options)
    return totals(partial, 1, x.dtype)[0]
