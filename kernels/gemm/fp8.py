"""The arguments and results of a product of e4m3 operands, and its arithmetic in plain PyTorch."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels.layernorm.sums import CHUNK, Summed
from uvit_fast.kernels.layers import Quantised
from uvit_fast.kernels.quantise import narrow as to_narrow
from uvit_fast.kernels.quantise import paired
from uvit_fast.kernels.runtime.checks import ACCUMULATE

# An epilogue, or that x has a second source, and its name in the tuning tables.
CASES = {
    "plain": "fp8_gemm",
    "two_sources": "fp8_gemm_two_sources",
    "residual": "fp8_gemm_residual",
    "gelu": "fp8_gemm_gelu",
}
BK = 128  # K of a step: a second source's columns of a weight begin at a multiple of it


class Asked(NamedTuple):
    """The arguments of a product: the epilogue of x @ weight.T."""

    epilogue: str  # "plain", "residual" or "gelu": the result as it is, plus the residual, or GELU(2 h) of the result h
    x: Tensor  # (M, K) e4m3
    layer: Quantised  # weight (N, K), or (N, K padded to a multiple of BK, and K2) with x2
    x2: Tensor | None = None  # (M, K2) e4m3, contracted with the last K2 columns of the weight
    stats: Tensor | Summed | None = None  # (2, at least M) fp32, mean and rstd of x: its LayerNorm is folded in
    side: Tensor | None = None  # (M, N) bf16, the residual
    overwrite: bool = True  # the bf16 result takes the residual's place
    wide: bool = True  # whether the bf16 result is wanted; of "gelu" the e4m3 one is, and nothing else
    narrow: bool = False  # whether the e4m3 result is
    sums: bool = False  # whether its sums are


class Made(NamedTuple):
    """What a product wrote; None for results that were not requested."""

    wide: Tensor | None  # (M, N) bf16
    narrow: Tensor | None  # (M, N) e4m3; of "gelu" in the order of `quantise.paired`
    sums: Tensor | None  # (N / 64, 2, M) fp32: see layernorm.sums


def reference(*args: Any, **more: Any) -> Made:
    """Return what the core's product of `Asked` returns, with exact sums of exact products."""
    epilogue, x, layer, x2, stats, side, overwrite, wide, narrow, sums = Asked(*args, **more)
    (M, K), weight = x.shape, layer.weight.to(ACCUMULATE)
    bias, scale = layer.rows
    y = x.to(ACCUMULATE) @ weight[:, :K].t()
    if x2 is not None:
        y += x2.to(ACCUMULATE) @ weight[:, -x2.shape[1] :].t()
    y *= scale
    if stats is not None:
        y *= (stats.rstd() if isinstance(stats, Summed) else stats[1, :M])[:, None]
    y += bias
    if epilogue == "gelu":
        return Made(None, to_narrow(F.gelu(2 * y))[:, paired(y.shape[1]).to(y.device)], None)
    if epilogue == "residual":
        y += side.to(ACCUMULATE)
    rounded = y.to(torch.bfloat16)
    if side is not None and wide and overwrite:
        rounded = side.copy_(rounded)
    y = rounded.to(ACCUMULATE)
    written = None
    if sums:
        chunks = y.view(M, -1, CHUNK)  # (M, N / 64, 64)
        apart = chunks - chunks.mean(2, keepdim=True)
        written = torch.stack([chunks.sum(2), apart.square().sum(2)]).permute(2, 0, 1).contiguous()
    return Made(rounded if wide else None, to_narrow(y) if narrow else None, written)
