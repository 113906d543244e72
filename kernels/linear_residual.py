"""A linear layer with the residual added in its epilogue: attention's output projection."""

import torch.nn.functional as F
from torch import Tensor


def reference(a: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x + Linear(a): a (..., K), weight (D, K), x (..., D) -> (..., D)."""
    return x + F.linear(a, weight, bias)
