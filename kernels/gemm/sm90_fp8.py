"""Products of e4m3 operands on sm_90: the kernel of `sm90`, whose results leave in bf16, in e4m3, or both.

Operands lie K-major, both of them: there is no product with the weight transposed. The sums are those of the tensor
cores, which keep 14 bits of a product in flight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from uvit_fast.kernels.gemm.sm90 import FEW, ROWS, SHORT, STAGES, STAGING, TOKENS, gemm_kernel
from uvit_fast.kernels.layernorm import sums as layernorm_sums
from uvit_fast.kernels.layers import Quantised
from uvit_fast.kernels.quantise import E4M3
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

BK = 128  # K per stage
CASES = {"plain": "fp8_gemm", "residual": "fp8_gemm_residual", "gelu": "fp8_gemm_gelu"}


class Made(NamedTuple):
    """What a product wrote; None for what was not asked for."""

    wide: Tensor | None  # (M, N) bf16
    narrow: Tensor | None  # (M, N) e4m3; of "gelu" in the order of `quantise.paired`
    sums: Tensor | None  # see layernorm.sums


def arguments(
    epilogue: str,
    x: Tensor,
    layer: Quantised,
    *,
    x2: Tensor | None = None,
    stats: Tensor | None = None,
    side: Tensor | None = None,
    wide: bool = True,
    narrow: bool = False,
    sums: bool = False,
    tokens: int = TOKENS,
    part: int = 64,
) -> tuple[tuple, dict, int, Made]:
    """Return the kernel's arguments, its launch options, the number of tiles, and the results: see `product`."""
    (M, K), N, paired = x.shape, layer.weight.shape[0], epilogue == "gelu"
    across, down = cdiv(N, 2 * ROWS), cdiv(M, tokens)
    made8 = x.new_empty(M, N) if narrow or paired else None
    out = side if side is not None else made8 if paired else x.new_empty(M, N, dtype=torch.bfloat16)
    written = layernorm_sums.new(out) if sums else None
    out_box = descriptor(out.view(torch.int16), part, ROWS // 2) if paired else descriptor(out, part, ROWS)
    x_box = descriptor(x, tokens, BK)
    steps = cdiv(K + (0 if x2 is None else x2.shape[1]), BK)
    args = (
        descriptor(layer.weight, ROWS, BK),
        x_box,
        x_box if x2 is None else descriptor(x2, tokens, BK),
        out_box,
        out_box,
        out_box,
        layer.rows,
        layer.rows if stats is None else stats,
        layer.weight if made8 is None else made8,
        layer.rows,
        layer.rows if written is None else written,
        M,
        N,
        0 if stats is None else stats.stride(0),
        across,
        across * down,
        steps,
        K // BK,
    )
    buffers = min(tokens, STAGING) // part
    options = {
        "STAGES": STAGES[tokens],
        "ARRIVING": 0 if side is None else buffers,
        "LEAVING": buffers if side is None else 0,
        "KIND": epilogue,
        "FOLD": stats is not None,
        "AHEAD": stats is not None and steps <= SHORT,
        "HAS_BIAS": True,
        "TWO": x2 is not None,
        "TRANSPOSED": False,
        "SUMS": sums,
        "SCALED": True,
        "PAIRED": paired,
        "WIDE": wide,
        "NARROW": narrow,
        "num_warps": 4,
        "maxnreg": 168,
    }
    return args, options, across * down, Made(out if wide and not paired else None, made8, written)


def product(epilogue: str, x: Tensor, layer: Quantised, **more) -> Made:
    """Launch a kernel for the epilogue of x @ weight.T.

    Args:
        epilogue: "plain", "residual" or "gelu".
        x: (M, K) e4m3, contiguous, K a multiple of 128 where there is an x2.
        layer: weight (N, K), or (N, K + K2) with x2.
        x2: (M, K2) e4m3, contracted with the last K2 columns of the weight.
        stats: (2, at least M) fp32, mean and rstd of x: the LayerNorm folded into the layer.
        side: (M, N) bf16, the residual, whose place the bf16 result takes.
        wide, narrow, sums: which results are wanted. Of "gelu" it is the e4m3 one, in the order of `quantise.paired`.
    """
    programs = multiprocessors(x.device)
    tile = FEW
    if cdiv(layer.weight.shape[0], 2 * ROWS) * cdiv(x.shape[0], TOKENS) >= programs:
        tile = {"part": tuning.choice(x.device, CASES[epilogue], x.shape[1])["part"]}
    args, options, tiles, made = arguments(epilogue, x, layer, **more, **tile)
    launch.run(x.device, gemm_kernel, (min(tiles, programs),), args, options)
    return made


assert E4M3.itemsize * BK == 128, "a stage has rows of 128 bytes"
