"""One solver update in one pass: guidance, the conversion of the prediction, the linear combination, the noise.

Legend: B samples, N = C*H*W numbers per sample. The network's output is (B, ...), or, with a guidance scale, (2B, ...),
the conditional branch first. State and sums are fp32 whatever the network's dtype. The coefficients are read from the
device, so that a captured graph can use new ones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.runtime import checks, launch
from uvit_fast.kernels.runtime.device import interpreting
from uvit_fast.kernels.runtime.launch import cdiv

HISTORY = 2  # older outputs that an update may use
_MASK = 0xFFFFFFFF


class Update(NamedTuple):
    """What one evaluation y, of eps or another prediction, does to the state: m = on_x x + on_output y, then

    next state = start * (the interval's first state) + sum of outputs[j] * m_j + noise * N(0, I),

    with the oldest m_j first and m last.
    """

    on_x: float
    on_output: float
    start: float
    noise: float
    outputs: tuple[float, ...]

    def row(self) -> list[float]:
        """Return the seven numbers as the kernel reads them, and one more that keeps a table's rows aligned."""
        return [*self[:4], *self.outputs, *[0.0] * (HISTORY + 2 - len(self.outputs))]


def reference(
    update: Update,
    eps: Tensor,
    x: Tensor,
    start: Tensor,
    history: Sequence[Tensor] = (),
    scale: Tensor | None = None,
    keys: Tensor | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the update in plain PyTorch.

    Args:
        eps: the output y, (B, ...) of any float dtype; with `scale`, (2B, ...): conditional, then unconditional.
        x, start: (B, ...) fp32: the state that was evaluated, the first state of the interval.
        history: the older outputs m_j that `update` uses, each (B, ...) fp32.
        scale: () fp32, s in cond + s (cond - uncond).
        keys: (B,) int64, the random key of each sample; without keys no noise is added.
        step: distinguishes the draws of one key.

    Returns:
        The next state and m, (B, ...) fp32.
    """
    eps = eps.float()
    if scale is not None:
        cond, uncond = eps.chunk(2)  # (B, ...) each
        eps = cond + scale * (cond - uncond)
    m = eps if (update.on_x, update.on_output) == (0.0, 1.0) else update.on_x * x + update.on_output * eps
    state = update.start * start
    for weight, output in zip(update.outputs, [*history, m], strict=True):
        state = state + weight * output
    if update.noise and keys is not None:
        state = state + update.noise * normal(keys, step, x[0].numel()).view(x.shape)
    return state, m


def normal(keys: Tensor, step: int, count: int) -> Tensor:
    """Return (B, count) fp32 of N(0, 1): element i of a row is a function of (keys[row], step, i) alone.

    Philox-4x32 with ten rounds (Salmon et al. 2011) on the counter (i, step, 0, 0), then Box-Muller.
    """
    c0 = torch.arange(count, device=keys.device).expand(len(keys), count)  # 32-bit words held in int64
    c1, c2, c3 = (torch.full_like(c0, value) for value in (step, 0, 0))
    k0, k1 = (keys & _MASK)[:, None], (keys >> 32 & _MASK)[:, None]  # (B, 1)
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # the upper half of a product that wraps is right under the mask
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    u, v = ((c >> 8).float() * 2**-24 + 2**-25 for c in (c0, c1))  # in (0, 1]
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


@triton.jit
def _uniform(bits):
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08  # 2^-24, 2^-25


@triton.jit(do_not_specialize=["step"])
def _kernel(
    state,  # (B, N) fp32, written: the next state
    m_out,  # (B, N) fp32, written with KEEP
    eps,  # (B, N), or (2B, N) with GUIDED
    x,  # (B, N) fp32, read with DATA
    start,  # (B, N) fp32
    older,  # (B, N) fp32, read with PAST = 2
    old,  # (B, N) fp32, read with PAST >= 1
    row,  # (8,) fp32: Update.row()
    scale,  # () fp32, read with GUIDED
    keys,  # (B,) int64, read with NOISE
    step,
    total,  # B * N
    N,
    GUIDED: tl.constexpr,
    DATA: tl.constexpr,
    PAST: tl.constexpr,
    NOISE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    m = tl.load(eps + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        m += tl.load(scale) * (m - tl.load(eps + total + at, mask=inside, other=0.0).to(tl.float32))
    if DATA:
        m = tl.load(row) * tl.load(x + at, mask=inside, other=0.0) + tl.load(row + 1) * m
    if KEEP:
        tl.store(m_out + at, m, mask=inside)
    new = tl.load(row + 2) * tl.load(start + at, mask=inside, other=0.0)
    if PAST == 2:
        new += tl.load(row + 4) * tl.load(older + at, mask=inside, other=0.0)
    if PAST >= 1:
        new += tl.load(row + 3 + PAST) * tl.load(old + at, mask=inside, other=0.0)
    new += tl.load(row + 4 + PAST) * m
    if NOISE:
        key = tl.load(keys + at // N, mask=inside, other=0)
        zero = at * 0
        c0, c1, _, _ = tl.philox(key, at % N, zero + step, zero, zero)
        z = tl.sqrt(-2 * tl.log(_uniform(c0))) * tl.cos(6.283185307179586 * _uniform(c1))
        new += tl.load(row + 3) * z
    tl.store(state + at, new, mask=inside)


def why_not(x: Tensor) -> str | None:
    """Return why the fused update cannot take the state x (B, ...) fp32, or None."""
    if x.device.type != "cuda" and not (interpreting() and x.device.type == "cpu"):
        return f"the state is on {x.device.type}; the fused update runs on CUDA"
    if x.dtype != torch.float32:
        return f"the state is {x.dtype}; the fused update takes float32"
    if not 0 < x.numel() < 2**30:
        return f"the state has {x.numel()} elements; the fused update takes 1 to 2^30"
    return checks.forward_mode()


def solver_step(
    update: Update,
    row: Tensor,
    eps: Tensor,
    x: Tensor,
    start: Tensor,
    history: Sequence[Tensor] = (),
    scale: Tensor | None = None,
    keys: Tensor | None = None,
    step: int = 0,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute `reference` in one launch; not differentiable.

    Args:
        update: says which terms there are; their values are read from `row`.
        row: (8,) fp32 on x's device, `update.row()` or other values of the same form.
        keep: whether m is needed; otherwise None is returned in its place.
    """
    count = x.numel()
    if eps.numel() != count * (1 if scale is None else 2):
        raise ValueError(
            f"solver_step: expected {1 if scale is None else 2} x {tuple(x.shape)} values of eps, "
            f"got {tuple(eps.shape)}"
        )
    assert len(update.outputs) == len(history) + 1 and len(history) <= HISTORY
    eps, x, start = eps.contiguous(), x.contiguous(), start.contiguous()
    state = torch.empty_like(x)
    m = torch.empty_like(x) if keep else None
    older, old = [x, x, *history][-2:]  # x stands in for what is not read
    block = 1024
    args = (state, state if m is None else m, eps, x, start, older, old, row)
    args += (row if scale is None else scale, row if keys is None else keys, step, count, count // len(x))
    options = {
        "GUIDED": scale is not None,
        "DATA": (update.on_x, update.on_output) != (0.0, 1.0),
        "PAST": len(history),
        "NOISE": bool(update.noise) and keys is not None,
        "KEEP": keep,
        "BLOCK": block,
        "num_warps": 4,
    }
    launch.run(x.device, _kernel, (cdiv(count, block),), args, options)
    return state, m
