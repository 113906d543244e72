"""What every GEMM core offers, and what the cores share: the epilogues' names, GELU's constants, memory for results."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.layernorm.sums import Summed
from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.runtime import reduce
from uvit_fast.kernels.runtime.checks import ACCUMULATE

# An epilogue, and its name in the tuning tables.
CASES = {
    "plain": "gemm",
    "residual": "gemm_residual",
    "gelu": "gemm_gelu",
    "gelu_save": "gemm_gelu_save",
    "gelu_backward": "gemm_gelu_backward",
}

# GELU(2 h) = h + h tanh(v), v = h (G0 + w max(G1 + G2 w, 0)), w = h^2: within 2.6e-5 of the erf form, its derivative
# within 1.1e-4. The kernels take and keep h, half the argument, which costs no instruction, since the preceding weights
# are halved. For |h| < 4e9, past which w^2 overflows.
G0: tl.constexpr = tl.constexpr(1.5950157396197052)
G1: tl.constexpr = tl.constexpr(0.2960452655195679)
G2: tl.constexpr = tl.constexpr(-0.011248595984110748)


class Call(NamedTuple):
    """The arguments of a core: the epilogue of x @ w.T, with `transposed` of x @ w."""

    epilogue: str  # of `CASES`
    x: Tensor  # (M, K), contiguous
    linear: Linear  # weight (N, K), or (N, K + K2) with x2; bias (N,), any float dtype
    x2: Tensor | None = None  # (M, K2): contracted with the last K2 columns of the weight
    stats: Tensor | Summed | None = None  # from `layernorm.fold.prepare`, as is linear: x's LayerNorm is folded in
    side: Tensor | None = None  # (M, N), contiguous: the residual, added last, or GELU's h
    overwrite: bool = False  # the result, computed from side value by value, takes its place
    sums: Tensor | None = None  # from `layernorm.sums.new`, filled with the result's
    transposed: bool = False

    @property
    def features(self) -> int:
        """N, the result's features."""
        return self.linear.weight.shape[1 if self.transposed else 0]


class Product(NamedTuple):
    """What a product with its epilogue wrote."""

    out: Tensor  # (M, N)
    second: Tensor  # (M, N): GELU's h of gelu_save, GELU's value of gelu_backward; else out
    partial: Tensor  # (tiles of M, N) fp32, parts of out's column sums, of gelu_backward; else out


def results(call: Call, tiles: int) -> Product:
    """Return memory for what a product in so many tiles of M writes: new, or, with `overwrite`, the side input's."""

    def new() -> Tensor:
        return call.x.new_empty(call.x.shape[0], call.features)

    if call.epilogue == "gelu_backward":
        out, second = new(), call.side if call.overwrite else new()
        return Product(out, second, out.new_empty(tiles, call.features, dtype=ACCUMULATE))
    out = call.side if call.epilogue == "residual" and call.overwrite else new()
    return Product(out, new() if call.epilogue == "gelu_save" else out, out)


class Core(ABC):
    """An architecture's GEMM. All results are accumulated in fp32 and have the input's dtype."""

    def takes_sums(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether the product of x (M, K), weight (N, K) computes rstd from sums faster than a launch would."""
        return False

    @abstractmethod
    def product(self, call: Call) -> Product:
        """Launch the kernel."""

    def linear(self, x: Tensor, linear: Linear, *, residual: Tensor | None = None, **more: Any) -> Tensor:
        """Return x @ w.T + bias, plus the residual (M, N) if there is one: (M, N). `more` is as in `Call`."""
        epilogue = "plain" if residual is None else "residual"
        return self.product(Call(epilogue, x, linear, side=residual, **more)).out

    def linear_gelu(
        self, x: Tensor, linear: Linear, *, stats: Tensor | Summed, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return GELU(2 h), h = LN(x) @ w.T + bias, with the LayerNorm folded in, and with `save` h: both (M, N)."""
        made = self.product(Call("gelu_save" if save else "gelu", x, linear, stats=stats))
        return made.out, made.second if save else None

    def linear_gelu_backward(
        self, dy: Tensor, weight: Tensor, h: Tensor, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the backward of the linear layer after a GELU, and of the GELU.

        Args:
            dy: (M, K), the gradient of GELU(2 h) @ w.T.
            weight: (K, N), that layer's.
            h: (M, N), half the GELU's argument.
            overwrite: GELU(2 h) takes h's place, value by value.

        Returns:
            The argument's gradient (dy @ w) * GELU'(2 h), (M, N); GELU(2 h), (M, N), which the weight gradient needs;
            the column sums of the first, (N,).
        """
        made = self.product(Call("gelu_backward", dy, Linear(weight), side=h, overwrite=overwrite, transposed=True))
        return made.out, made.second, *reduce.totals(made.partial, 1, dy.dtype)

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Return dy @ w, (M, K), for dy (M, N) and w (N, K), whose rows may be any distance apart.

        It is cuBLAS's unless ours measured faster.
        """
        return dy @ weight

    def weight_gradient(
        self, dy: Tensor, x: Tensor, *, bias: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return dy.T @ x, (N, K), and with `bias` the column sums of dy, (N,).

        They are cuBLAS's and a reduction's unless ours measured faster.

        Args:
            dy: (M, N); x: (M, K), contiguous.
            out: memory for the gradient, rows any distance apart; None: new memory.
        """
        out = dy.new_empty(dy.shape[1], x.shape[1]) if out is None else out
        torch.mm(dy.t(), x, out=out)
        return out, reduce.column_sums(dy) if bias else None
