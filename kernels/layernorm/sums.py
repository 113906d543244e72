"""Partial sums from which a LayerNorm's statistics follow, computed by the kernel that writes its input.

For every 64 features of a token, their sum and the sum of their squared distances from their mean, both fp32: exact for
any mean, and merged in a pass that reads a sixteenth of the bytes of a 16-bit input.
"""

from math import prod
from typing import NamedTuple

from torch import Tensor

from uvit_fast.kernels.runtime.checks import ACCUMULATE

CHUNK = 64  # features per sum
WIDEST = 320  # tokens of the widest tile: beyond the last token statistics have room for one, which a GEMM reads


class Summed(NamedTuple):
    """The sums of a LayerNorm's input, from which its reader computes the statistics."""

    sums: Tensor  # (D / 64, 2, tokens) fp32
    eps: float  # the LayerNorm's

    def rstd(self) -> Tensor:
        """Return what its reader computes, (tokens,) fp32."""
        total, squares = self.sums.unbind(1)  # (D / 64, tokens)
        apart = total / CHUNK - total.mean(0) / CHUNK
        return ((squares / CHUNK + apart.square()).mean(0) + self.eps).rsqrt()


def new(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return memory for the sums of a result (..., D), of `like`'s shape or the given one: (D / 64, 2, tokens) fp32."""
    *tokens, D = like.shape if shape is None else shape
    return like.new_empty(D // CHUNK, 2, prod(tokens), dtype=ACCUMULATE)
