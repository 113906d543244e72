"""The parameters of a network's layers, as the fused ops take them."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """The parameters of a LayerNorm over the last dimension."""

    weight: Tensor  # (D,), the paper's gamma
    bias: Tensor  # (D,), beta
    eps: float = 1e-5


class Linear(NamedTuple):
    """The parameters of a linear layer x @ weight.T + bias."""

    weight: Tensor  # (N, K)
    bias: Tensor | None = None  # (N,)


class Quantised(NamedTuple):
    """A linear layer in e4m3, with the preceding LayerNorm folded in if there is one: see `quantise`."""

    weight: Tensor  # (N, K) e4m3, columns in the order of its operand's features
    rows: Tensor  # (2, N) fp32: bias, scale
