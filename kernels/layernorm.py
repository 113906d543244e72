"""LayerNorm around a GEMM: what the folded forward needs before it, the backward after it, and column sums.

Plain Triton, for every architecture. Memory-bound: each kernel reads its inputs once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def _prepare_kernel(
    x,  # (M, D)
    gamma,  # (D,)
    beta,  # (D,)
    weight,  # (N, D)
    bias,  # (N,), unread without HAS_BIAS
    stats,  # (2, M) fp32: mean, rstd
    folded,  # (N, D): gamma * weight
    sums,  # (N,) fp32: row sums of `folded` as rounded
    offset,  # (N,) fp32: bias + weight @ beta
    M,
    N,
    eps,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid = tl.program_id(0)
    weight_programs = tl.cdiv(N, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (col < D)[None, :]
    if pid < weight_programs:
        row = pid * ROWS + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & inside
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gamma + col, mask=col < D, other=0.0).to(tl.float32)
        b = tl.load(beta + col, mask=col < D, other=0.0).to(tl.float32)
        rounded = (w * g[None, :]).to(folded.dtype.element_ty)
        tl.store(folded + at, rounded, mask=mask)
        tl.store(sums + row, tl.sum(rounded.to(tl.float32), axis=1), mask=row < N)
        shift = tl.sum(w * b[None, :], axis=1)
        if HAS_BIAS:
            shift += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        tl.store(offset + row, shift, mask=row < N)
    else:
        row = (pid - weight_programs) * ROWS + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & inside
        v = tl.load(x + row.to(tl.int64)[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(v, axis=1) / D
        centred = tl.where(inside, v - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / D  # of the centred values: exact for any mean
        tl.store(stats + row, mean, mask=row < M)
        tl.store(stats + M + row, 1.0 / tl.sqrt(variance + eps), mask=row < M)


def prepare(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row statistics of x and the weight with the LayerNorm's affine part folded in, in one launch.

    Linear(LN(x)) = rstd * (x @ folded.T - mean * sums) + offset.

    Returns:
        stats (2, M) fp32 (mean, rstd); folded (N, D); sums (N,) fp32; offset (N,) fp32.
    """
    (M, D), N = x.shape, weight.shape[0]
    stats = x.new_empty(2, M, dtype=launch.ACCUMULATE)
    folded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    sums, offset = (x.new_empty(N, dtype=launch.ACCUMULATE) for _ in range(2))
    tuned = launch.choice(x.device, "prepare", D)
    grid = (triton.cdiv(N, tuned["rows"]) + triton.cdiv(M, tuned["rows"]),)
    with launch.guard(x.device):
        _prepare_kernel[grid](
            x,
            gamma,
            beta,
            weight,
            x if bias is None else bias,
            stats,
            folded,
            sums,
            offset,
            M,
            N,
            eps,
            D=D,
            HAS_BIAS=bias is not None,
            BLOCK=triton.next_power_of_2(D),
            ROWS=tuned["rows"],
            num_warps=tuned["warps"],
        )
    return stats, folded, sums, offset


@triton.jit
def _backward_kernel(
    g,  # (M, D): gradient of the normalised, affine output
    x,  # (M, D)
    dy,  # (M, D): gradient that passes the LayerNorm by, unread without RESIDUAL
    stats,  # (2, M) fp32: mean, rstd
    gamma,  # (D,)
    beta,  # (D,)
    dx,  # (M, D)
    normed,  # (M, D): LayerNorm(x), for the weight gradient
    partial,  # (programs, 3, D) fp32: sums of g * x_hat, of g, and of dy
    M,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.arange(0, BLOCK)
    inside = col < D
    scale = tl.load(gamma + col, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(beta + col, mask=inside, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK], tl.float32)
    dbeta = tl.zeros([BLOCK], tl.float32)
    passed = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0)
    # The next row is on its way while this one is worked on.
    at = first.to(tl.int64) * D + col
    g_next = tl.load(g + at, mask=inside & (first < M), other=0.0)
    x_next = tl.load(x + at, mask=inside & (first < M), other=0.0)
    if RESIDUAL:
        dy_next = tl.load(dy + at, mask=inside & (first < M), other=0.0)
    for row in range(first, M, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * D + col
        gv = g_next.to(tl.float32)
        xv = x_next.to(tl.float32)
        if RESIDUAL:
            dyv = dy_next.to(tl.float32)
        ahead = row + tl.num_programs(0)
        at_next = tl.cast(ahead, tl.int64) * D + col
        g_next = tl.load(g + at_next, mask=inside & (ahead < M), other=0.0)
        x_next = tl.load(x + at_next, mask=inside & (ahead < M), other=0.0)
        if RESIDUAL:
            dy_next = tl.load(dy + at_next, mask=inside & (ahead < M), other=0.0)
        mean = tl.load(stats + row)
        rstd = tl.load(stats + M + row)
        hat = tl.where(inside, (xv - mean) * rstd, 0.0)
        gs = gv * scale
        c1 = tl.sum(gs, axis=0) / D
        c2 = tl.sum(gs * hat, axis=0) / D
        d = rstd * (gs - c1 - hat * c2)
        if RESIDUAL:
            d += dyv
            passed += dyv
        dgamma += gv * hat
        dbeta += gv
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
        tl.store(normed + at, (hat * scale + shift).to(normed.dtype.element_ty), mask=inside)
    out = partial + first * 3 * D + col
    tl.store(out, dgamma, mask=inside)
    tl.store(out + D, dbeta, mask=inside)
    tl.store(out + 2 * D, passed, mask=inside)


def backward(
    g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through LayerNorm in one pass over the tokens.

    Args:
        g: (M, D), the gradient of LayerNorm(x).
        stats: (2, M) fp32, as `prepare` wrote them.
        dy: (M, D), added to the gradient of x: the residual's way around the LayerNorm.

    Returns:
        dx (M, D); LayerNorm(x) (M, D), which the weight gradient needs and nobody kept; sums (3, D) fp32: the gradients of
        gamma and beta, and the column sums of dy.
    """
    M, D = x.shape
    dx, normed = torch.empty_like(x), torch.empty_like(x)
    tuned = launch.choice(x.device, "ln_backward", D)
    programs = min(M, tuned["programs"])
    partial = x.new_empty(programs, 3, D, dtype=launch.ACCUMULATE)
    with launch.guard(x.device):
        _backward_kernel[(programs,)](
            g,
            x,
            g if dy is None else dy,
            stats,
            gamma,
            beta,
            dx,
            normed,
            partial,
            M,
            D=D,
            RESIDUAL=dy is not None,
            BLOCK=triton.next_power_of_2(D),
            num_warps=tuned["warps"],
        )
    return dx, normed, partial.sum(0)


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
    """Sums over the tokens of x (M, N), in fp32: a bias gradient. Deterministic."""
    M, N = x.shape
    tuned = launch.choice(x.device, "column_sums", N)
    programs = min(triton.cdiv(M, tuned["rows"]), tuned["programs"])
    partial = x.new_empty(programs, N, dtype=launch.ACCUMULATE)
    with launch.guard(x.device):
        _column_sums_kernel[(programs, triton.cdiv(N, tuned["block"]))](
            x, partial, M, N, ROWS=tuned["rows"], BLOCK=tuned["block"], num_warps=tuned["warps"]
        )
    return partial.sum(0)
