"""Products of e4m3 operands on sm_90: the kernel of `sm90`, whose results leave in bf16, in e4m3, or both.

Both operands are K-major: there is no product with the weight transposed. The sums are the tensor cores', which keep 14
bits of a product in flight.
"""

from typing import Any

import torch
from torch import Tensor

from uvit_fast.kernels.gemm import sm90
from uvit_fast.kernels.gemm.contract import Call, Product
from uvit_fast.kernels.gemm.fp8 import CASES, Asked, Made
from uvit_fast.kernels.layernorm import sums as layernorm_sums
from uvit_fast.kernels.layers import Linear, Quantised
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime.device import multiprocessors

TILE = ("tokens", "part", "pairs")  # what of a product of many tokens is tuned


def arguments(asked: Asked, **tile: int) -> tuple[tuple, dict, int, Made]:
    """Return the kernel's arguments, its launch options, the number of programs, and the results.

    `tile` is as in `sm90.arguments`.
    """
    epilogue, x, layer, x2, stats, side, overwrite, wide, narrow, sums = asked
    M, N, paired = x.shape[0], layer.weight.shape[0], epilogue == "gelu"
    made8 = x.new_empty(M, N) if narrow or paired else None
    inplace = side is not None and (overwrite or not wide)
    out = side if inplace else made8 if paired else x.new_empty(M, N, dtype=torch.bfloat16)
    written = layernorm_sums.new(out) if sums else None
    call = Call(epilogue, x, Linear(layer.weight, layer.rows), x2, stats, side, sums=written)
    args, options, programs, _ = sm90.arguments(call, Product(out, out, out), wide=wide, narrow=made8, **tile)
    return args, options, programs, Made(out if wide and not paired else None, made8, written)


def takes_sums(x: Tensor, layer: Quantised) -> bool:
    """Return whether the product of x (M, K) computes rstd from sums faster than a launch would."""
    return tuning.few(x.device, "fp8_few", *layer.weight.shape, x.shape[0]).get("sums", False)


def product(*args: Any, **more: Any) -> Made:
    """Compute `fp8.reference` of `Asked` in one launch."""
    asked = Asked(*args, **more)
    x, weight = asked.x, asked.layer.weight
    tile = sm90.few("fp8_few", x, weight)
    if not tile and sm90.fills(x, len(weight)):
        chosen = tuning.choice(x.device, CASES[asked.epilogue if asked.x2 is None else "two_sources"], x.shape[1])
        tile = {name: chosen[name] for name in TILE}
    args, options, programs, made = arguments(asked, **tile or sm90.FEW, at_once=multiprocessors(x.device))
    launch.run(x.device, sm90.gemm_kernel, (programs,), args, options)
    return made
