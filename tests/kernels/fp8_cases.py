"""The products of an e4m3 block with arguments of any shape, for the reference arithmetic and for GPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.kernels.gemm import fp8
from uvit_fast.kernels.layernorm.fold import new_statistics
from uvit_fast.kernels.layers import Linear, Norm, Quantised
from uvit_fast.kernels.quantise import narrow, paired, quantise, two_sources

ALLOWED = {"wide": 3e-3, "narrow": 2e-2, "sums": 6e-3}  # of a result's norm, which the tensor cores' sums may cost
NAMES = ["qkv", "proj", "fc1", "fc2", "fc2_narrow", "skip"]


def linear(N: int, K: int, device: str = "cpu", bias: bool = True) -> Linear:
    """A layer that keeps its input's deviation, in bf16."""
    weight = torch.randn(N, K, device=device) * K**-0.5
    return Linear(weight.bfloat16(), torch.randn(N, device=device).bfloat16() if bias else None)


def norm(D: int, device: str = "cpu") -> Norm:
    return Norm(1 + 0.1 * torch.randn(D, device=device), 0.1 * torch.randn(D, device=device))


def off(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def check(made: fp8.Made, want: fp8.Made) -> None:
    """Refuse a product's results that are not its arithmetic but for the tensor cores' sums.

    They err by about d = 1e-3, less than bf16's rounding. An e4m3 result differs where that tips a value to its
    neighbour, s = 0.09 of it away: one in s / d, and so by sqrt(s d) in all.
    """
    for field, allowed in ALLOWED.items():
        ours, theirs = getattr(made, field), getattr(want, field)
        assert (ours is None) == (theirs is None), field
        if ours is not None:
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert off(ours, theirs) < allowed, f"{field} is off by {off(ours, theirs):.1e}"
            largest = theirs.float().abs().max()
            assert (ours.float() - theirs.float()).abs().max() <= largest / 8, field


def statistics(x: Tensor) -> Tensor:
    """Mean and rstd of x (M, D), in fp32, with room for whole tiles."""
    stats = new_statistics(x, len(x)).zero_()
    stats[:, : len(x)] = torch.stack([x.float().mean(1), (x.float().var(1, correction=0) + 1e-5).rsqrt()])
    return stats


def arguments(
    name: str, M: int, D: int, device: str = "cpu", mean: float = 0.3
) -> tuple[str, Tensor, Quantised, dict[str, Any]]:
    """What a core's product takes: the epilogue, x, the layer, and the rest by name."""
    H, x = 4 * D, (torch.randn(M, D, device=device) + mean).bfloat16()
    if name == "qkv":
        return (
            "plain",
            narrow(x),
            quantise(linear(3 * D, D, device, bias=False), norm(D, device)),
            {"stats": statistics(x)},
        )
    if name == "fc1":
        return "gelu", narrow(x), quantise(linear(H, D, device), norm(D, device), scale=0.5), {
            "stats": statistics(x), "wide": False
        }  # fmt: skip
    if name == "proj":
        rest = {"side": x, "narrow": True, "sums": True}
        return "residual", narrow(torch.randn(M, D, device=device)), quantise(linear(D, D, device)), rest
    if name == "skip":
        layer = quantise(linear(D, 2 * D, device), order=two_sources(D, D, fp8.BK))
        return "plain", narrow(x), layer, {
            "x2": narrow(torch.randn(M, D, device=device)), "narrow": True, "sums": True
        }  # fmt: skip
    h, layer = narrow(F.gelu(torch.randn(M, H, device=device))), quantise(linear(D, H, device), order=paired(H))
    wide = name == "fc2"
    return "residual", h, layer, {"side": x, "narrow": True, "sums": wide, "wide": wide}
