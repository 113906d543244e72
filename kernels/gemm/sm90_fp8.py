"""Products of e4m3 operands on sm_90: the kernel of `sm90`, whose results leave in bf16, in e4m3, or both.

Both operands are K-major: there is no product with the weight transposed. The sums are the tensor cores', which keep 14
bits of a product in flight.
"""

import torch
from torch import Tensor

from uvit_fast.kernels.gemm.fp8 import BK, CASES, Made
from uvit_fast.kernels.gemm.sm90 import FEW, ROWS, SHORT, STAGES, STAGING, TOKENS, gemm_kernel
from uvit_fast.kernels.layernorm import sums as layernorm_sums
from uvit_fast.kernels.layers import Quantised
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

TILE = ("tokens", "part", "pairs")  # what of a product is tuned


def arguments(
    epilogue: str,
    x: Tensor,
    layer: Quantised,
    *,
    x2: Tensor | None = None,
    stats: Tensor | None = None,
    side: Tensor | None = None,
    overwrite: bool = True,
    wide: bool = True,
    narrow: bool = False,
    sums: bool = False,
    tokens: int = TOKENS,
    part: int = 64,
    pairs: int = 1,
) -> tuple[tuple, dict, int, Made]:
    """Return the kernel's arguments, its launch options, the number of tiles, and the results: see `product`."""
    (M, K), N, paired = x.shape, layer.weight.shape[0], epilogue == "gelu"
    across, down = cdiv(N, 2 * ROWS), cdiv(M, tokens)
    made8 = x.new_empty(M, N) if narrow or paired else None
    inplace = side is not None and (overwrite or not wide)
    out = side if inplace else made8 if paired else x.new_empty(M, N, dtype=torch.bfloat16)
    written = layernorm_sums.new(out) if sums else None
    out_box = descriptor(out.view(torch.int16), part, ROWS // 2) if paired else descriptor(out, part, ROWS)
    x_box = descriptor(x, tokens, BK)
    steps = cdiv(K, BK) + (0 if x2 is None else cdiv(x2.shape[1], BK))
    args = (
        descriptor(layer.weight, ROWS, BK),
        x_box,
        x_box if x2 is None else descriptor(x2, tokens, BK),
        out_box,
        out_box,
        out_box if side is None or inplace else descriptor(side, part, ROWS),
        None,
        None,
        None,
        None,
        layer.rows,
        layer.rows if stats is None else stats,
        layer.weight if made8 is None else made8,
        layer.rows,
        layer.rows if written is None else written,
        layer.rows,
        layer.rows,
        M,
        N,
        0 if stats is None else stats.stride(0),
        across,
        across * down,
        steps,
        cdiv(K, BK),
        0.0,
    )
    buffers = min(tokens, STAGING) // part
    options = {
        "STAGES": STAGES[tokens],
        "ARRIVING": 0 if side is None else buffers,
        "LEAVING": buffers if side is None else 0,
        "KIND": epilogue,
        "FOLD": "" if stats is None else "stats",
        "AHEAD": stats is not None and steps <= SHORT,
        "HAS_BIAS": True,
        "TWO": x2 is not None,
        "TRANSPOSED": False,
        "SUMS": sums,
        "SCALED": True,
        "PAIRED": paired,
        "WIDE": wide,
        "NARROW": narrow,
        "CHUNKS": 1,
        "MOST": 1,
        "PAIRS": pairs,
        "HALVES": False,
        "EARLY": False,
        "num_warps": 4,
        "maxnreg": 168 if pairs == 1 else 96,
    }
    return args, options, across * down, Made(out if wide and not paired else None, made8, written)


def product(epilogue: str, x: Tensor, layer: Quantised, **more) -> Made:
    """Compute `fp8.reference` in one launch."""
    programs = multiprocessors(x.device)
    tile = FEW
    if cdiv(layer.weight.shape[0], 2 * ROWS) * cdiv(x.shape[0], TOKENS) >= programs:
        case = CASES["two_sources" if more.get("x2") is not None else epilogue]
        chosen = tuning.choice(x.device, case, x.shape[1])
        tile = {name: chosen[name] for name in TILE}
    args, options, tiles, made = arguments(epilogue, x, layer, **more, **tile)
    launch.run(x.device, gemm_kernel, (min(tiles, programs),), args, options)
    return made
