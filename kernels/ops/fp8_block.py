"""A transformer block with e4m3 products, for sampling: each operand is written in e4m3 by the kernel before it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uvit_fast.kernels.attention import sm90_forward, sm90_tiles
from uvit_fast.kernels.gemm import fp8, sm90_fp8
from uvit_fast.kernels.gemm.fp8 import Made
from uvit_fast.kernels.layernorm import added, fold
from uvit_fast.kernels.layernorm.sums import Summed
from uvit_fast.kernels.layers import Linear, Norm, Quantised
from uvit_fast.kernels.ops import attention as wide_attention
from uvit_fast.kernels.quantise import E4M3, Inputs, Scaled, narrow, paired, rounded, scaled, two_sources, unseen
from uvit_fast.kernels.runtime.device import architecture, described


class Layers(NamedTuple):
    """A block's layers in e4m3; None for those that it lacks, or that stay in bf16."""

    qkv: Quantised | None  # (3D, D), norm1 folded in
    proj: Quantised | None  # (D, D), columns in the order of attention's result
    fc1: Quantised | None  # (H, D), norm2 folded in, halved as GELU's argument
    fc2: Quantised | None  # (D, H), columns in the order of GELU's result
    skip: Quantised | None  # (D, 2D)


def why_not(width: int, heads: int, hidden: int, device: torch.device) -> str | None:
    """Return why a device cannot run such blocks, both for itself and for their widths, or None."""
    reasons = [unfit(width, heads, hidden)]
    if device.type != "cuda" or architecture(device) != 90:
        reasons.insert(0, f"its kernels need compute capability 9.0 (H100, H200), got {described(device)}")
    return "; ".join(filter(None, reasons)) or None


def unfit(width: int, heads: int, hidden: int) -> str | None:
    """Return why no such block can be derived, for the kernels or for `REFERENCE`, or None."""
    reasons = []
    if width % 64 or hidden % 64:
        reasons.append(f"the widths {width} and {hidden} must be multiples of 64")
    if width % heads or not 64 <= width // heads <= 80 or width // heads % 8:
        reasons.append(f"the head dim must be 64, 72 or 80, got {width / heads:g}")
    return "; ".join(reasons) or None


def unrounded(
    norm1: Norm, qkv: Linear, proj: Linear, norm2: Norm, fc1: Linear, fc2: Linear, skip: Linear | None, heads: int
) -> dict[str, Callable[[], Scaled]]:
    """Return what gives each of a block's layers before it is rounded, by its name in `Layers`."""
    D, H = qkv.weight.shape[1], fc1.weight.shape[0]
    found = {
        "qkv": partial(scaled, qkv, norm1),
        "proj": partial(scaled, proj, order=torch.tensor(sm90_tiles.narrow(heads, D // heads))),
        "fc1": partial(scaled, fc1, norm2, scale=0.5),
        "fc2": partial(scaled, fc2, order=paired(H)),
    }
    return found if skip is None else found | {"skip": partial(scaled, skip, order=two_sources(D, D, fp8.BK))}


def derive(*layers: Any) -> Layers:
    """Return a block's layers, of `unrounded`'s arguments, in e4m3, each weight rounded by itself. The layers
    themselves stay as they are.
    """
    found = unrounded(*layers)
    return Layers(*(rounded(found[kind]()) if kind in found else None for kind in Layers._fields))


def _attention(qkv: Tensor) -> Tensor:
    return sm90_forward.forward(qkv, E4M3)[0]


def _attention_reference(qkv: Tensor) -> Tensor:
    H, D = qkv.shape[3:]
    return narrow(wide_attention.reference(qkv.float()))[..., torch.tensor(sm90_tiles.narrow(H, D))]


def _statistics_reference(x: Tensor, sums: Tensor | None, into: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    if into is not None:
        into.copy_(narrow(x))
    x = x.float()
    return torch.stack([x.mean(1), (x.var(1, correction=0) + eps).rsqrt()])


class Arithmetic(NamedTuple):
    """The implementation: the kernels, or PyTorch."""

    product: Callable[..., Made]
    attention: Callable[[Tensor], Tensor]  # of qkv (B, L, 3, H, D), e4m3, in the order of `sm90_tiles.narrow`
    statistics: Callable[..., Tensor]  # as `layernorm.fold.statistics`
    takes_sums: Callable[[Tensor, Quantised], bool]  # whether a product of x and a layer takes sums for statistics
    add: Callable[..., Tensor]  # as `layernorm.added.add`


def _never(x: Tensor, layer: Quantised) -> bool:
    return False


KERNELS = Arithmetic(sm90_fp8.product, _attention, fold.statistics, sm90_fp8.takes_sums, added.add)
REFERENCE = Arithmetic(fp8.reference, _attention_reference, _statistics_reference, _never, added.reference)


def watching(by: Arithmetic, seen: dict[int, Inputs]) -> Arithmetic:
    """Return the same arithmetic, which adds each product's inputs to those of its layer, by `id`; it always takes
    statistics, which tell rstd.
    """

    def product(epilogue: str, x: Tensor, layer: Quantised, **how: Any) -> Made:
        x2, stats = how.get("x2"), how.get("stats")
        gap = layer.weight.shape[1] - x.shape[1] - (0 if x2 is None else x2.shape[1])
        operand = x if x2 is None else torch.cat([x, x.new_zeros(len(x), gap), x2], 1)
        before = seen.get(id(layer)) or unseen(operand.shape[1], x.device)
        seen[id(layer)] = before.plus(operand, None if stats is None else stats[1, : len(x)])
        return by.product(epilogue, x, layer, **how)

    return by._replace(product=product, takes_sums=_never)


class Stream(NamedTuple):
    """The residual stream (M, D) after a part: in bf16, in e4m3, with its sums; None for what was not written."""

    wide: Tensor | None
    narrow: Tensor | None = None
    sums: Tensor | None = None
    added: tuple[Tensor, ...] = ()  # (M, D) bf16, outputs of other evaluations that wide lacks; there is no narrow then
    free: bool = True  # whether a result may take the place of wide


# A block's three parts.


def joined(x: Stream, skip: Tensor, layers: Layers, by: Arithmetic = KERNELS) -> Stream:
    """Return Linear(Concat(x, skip)) of the e4m3 x and a long skip (M, D) e4m3."""
    x8 = x.narrow if x.narrow is not None else _narrowed(x, by, wanted=False)[0].narrow
    return Stream(*by.product("plain", x8, layers.skip, x2=skip, narrow=True, sums=True))


def attended(x: Stream, layers: Layers, batch: int, heads: int, by: Arithmetic = KERNELS) -> Stream:
    """Return x + proj(attention(norm1(x)))."""
    x, stats = measured(x, layers.qkv, by)
    qkv = by.product("plain", x.narrow, layers.qkv, stats=stats).wide  # (M, 3D)
    M, D = x.wide.shape
    a = by.attention(qkv.view(batch, M // batch, 3, heads, D // heads)).view(M, D)
    del qkv
    return Stream(*by.product("residual", a, layers.proj, side=x.wide, overwrite=x.free, narrow=True, sums=True))


def through_mlp(
    x: Stream, layers: Layers, *, wide: bool = True, narrow: bool = True, by: Arithmetic = KERNELS
) -> Stream:
    """Return x + fc2(gelu(fc1(norm2(x)))).

    Args:
        wide, narrow: which results are read afterwards; wide comes with its sums.
    """
    x, stats = measured(x, layers.fc1, by)
    h = by.product("gelu", x.narrow, layers.fc1, stats=stats, wide=False).narrow  # (M, H)
    asked = {"overwrite": x.free, "wide": wide, "narrow": narrow, "sums": wide}
    return Stream(*by.product("residual", h, layers.fc2, side=x.wide, **asked))


def plus(x: Stream, output: Tensor, by: Arithmetic = KERNELS) -> Stream:
    """Return x with a sublayer's output (M, D) of another evaluation, which its reader will add."""
    if len(x.added) == added.MOST:
        x = summed(x, by)
    return Stream(x.wide, added=(*x.added, output), free=x.free)


def summed(x: Stream, by: Arithmetic = KERNELS) -> Stream:
    """Return x with all added."""
    return _narrowed(x, by)[0] if x.added else x


def measured(x: Stream, layer: Quantised, by: Arithmetic = KERNELS) -> tuple[Stream, Tensor | Summed]:
    """Return x with its e4m3 values, and its statistics, or the sums that the product with this layer takes."""
    if x.narrow is None:
        return _narrowed(x, by)
    if x.sums is not None and by.takes_sums(x.narrow, layer):
        return x, Summed(x.sums, fold.EPS)
    return x, by.statistics(x.wide, x.sums)


def narrowed(x: Stream, by: Arithmetic = KERNELS) -> Stream:
    """Return x with all added, and its e4m3 values."""
    return x if x.narrow is not None else _narrowed(x, by)[0]


def _narrowed(x: Stream, by: Arithmetic, wanted: bool = True) -> tuple[Stream, Tensor]:
    """Return x with its e4m3 values, all added, and its statistics, in one pass; with its bf16 values if wanted."""
    narrow = torch.empty_like(x.wide, dtype=E4M3)
    if not x.added:
        return x._replace(narrow=narrow), by.statistics(x.wide, None, narrow)
    out = None if not wanted else x.wide if x.free else torch.empty_like(x.wide)
    stats = by.add(x.wide, x.added, out, narrow)
    return Stream(out, narrow), stats
