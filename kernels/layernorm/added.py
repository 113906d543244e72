"""Add outputs kept from another evaluation to a residual stream, in one pass that produces what its reader needs: the
sum, its values in e4m3, its mean and rstd.

x + a + b is rounded once, where two additions round twice.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.layernorm.fold import EPS, new_statistics, ranges, split, write_statistics
from uvit_fast.kernels.quantise import narrow as to_narrow
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.launch import cdiv

MOST = 2  # outputs per pass


def reference(x: Tensor, added: Sequence[Tensor], out: Tensor | None, narrow: Tensor) -> Tensor:
    """Compute `add` in plain PyTorch."""
    y = (x.float() + sum(each.float() for each in added)).to(x.dtype)
    if out is not None:
        out.copy_(y)
    narrow.copy_(to_narrow(y))
    y = y.float()
    return torch.stack([y.mean(1), (y.var(1, correction=0) + EPS).rsqrt()])


def add(x: Tensor, added: Sequence[Tensor], out: Tensor | None, narrow: Tensor) -> Tensor:
    """Return mean and rstd of each row of x plus one or two outputs, (2, at least M) fp32.

    Args:
        x, added: (M, D) of one dtype.
        out: (M, D), filled with the sum; may be x. None: the sum is not needed.
        narrow: (M, D) e4m3, filled with the sum.
    """
    assert 1 <= len(added) <= MOST
    (M, D), stats = x.shape, new_statistics(x, x.shape[0])
    tuned = tuning.choice(x.device, "prepare", D)
    args = (x, added[0], added[-1], x if out is None else out, narrow, stats, M, stats.stride(0), EPS)
    options = {
        **split(D),
        "TWO": len(added) == 2,
        "WIDE": out is not None,
        "ROWS": tuned["rows"],
        "num_warps": tuned["warps"],
    }
    launch.run(x.device, _kernel, (cdiv(M, tuned["rows"]),), args, options)
    return stats


@triton.jit
def _kernel(
    x,  # (M, D)
    first,  # (M, D)
    second,  # (M, D), read with TWO
    out,  # (M, D), written with WIDE; may be x
    narrow,  # (M, D) e4m3
    stats,  # (2, at least M) fp32: mean, rstd
    M,
    stride,  # of stats
    eps,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    TWO: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = row.to(tl.int64)[:, None] * D, (row < M)[:, None]
    cols, ys = ranges(LO, HI), ()
    for i in tl.static_range(len(cols)):
        mask = inside
        if i > 0:
            mask = inside & (cols[i] < D)[None, :]
        where = at + cols[i][None, :]
        y = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(first + where, mask=mask, other=0.0).to(tl.float32)
        if TWO:
            y += tl.load(second + where, mask=mask, other=0.0).to(tl.float32)
        y = y.to(x.dtype.element_ty)
        if WIDE:
            tl.store(out + where, y, mask=mask)
        y = y.to(tl.float32)
        tl.store(narrow + where, y.to(narrow.dtype.element_ty), mask=mask)
        ys = ys + (y,)
    write_statistics(ys, cols, stats, stride, row, M, eps, D)
