"""A U-ViT whose blocks' products have e4m3 operands: sampling in FP8 on compute capability 9.0.

The first and last layers, LayerNorm's statistics, softmax and the residual stream stay in bf16 and fp32, and so do the
requested parts of blocks. The weights are derived once from the network's, which never change: its checkpoint stays the
published one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from uvit_fast.config import FP8_KEEP
from uvit_fast.config.plans import fitting
from uvit_fast.kernels.ops import attention, fp8_block
from uvit_fast.kernels.ops.fp8_block import Layers, Stream
from uvit_fast.kernels.quantise import Inputs, compensated
from uvit_fast.model.cached import Cache, block_names
from uvit_fast.model.replayed import Replayed, replays
from uvit_fast.model.uvit import Block, UViT
from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.hooks import hooked, hooked_everywhere


def parts(depth: int) -> list[str]:
    """Return the parts that may stay in bf16, in order: each block's attention and MLP, and the linear layer over the
    long skip before them: "in_blocks.0.attn", ..., "out_blocks.0.skip_linear", "out_blocks.0.attn", ...
    """
    return [
        f"{block}.{part}"
        for block in block_names(depth)
        for part in ("skip_linear", "attn", "mlp")
        if part != "skip_linear" or block.startswith("out_blocks.")
    ]


def check(model: Any, device: torch.device | str | None, keep: Sequence[str] = FP8_KEEP) -> None:
    """Refuse what the kernels do not support.

    Args:
        model: a UViT, or its settings by name.
        device: that runs it; None: any, by `fp8_block.REFERENCE`.
        keep: see `Fp8UViT`.

    Raises:
        UserError: a device not of compute capability 9.0, widths or a number of tokens without a kernel, all that there
            is in one line, with what came; or a name in `keep` that matches no part.
    """
    device = None if device is None else as_device(device)
    widths = (model.embed_dim, model.num_heads, int(model.embed_dim * model.mlp_ratio))
    reasons = [fp8_block.unfit(*widths) if device is None else fp8_block.why_not(*widths, device)]
    extras = 1 + bool(model.num_classes) + (model.context_tokens if model.context_dim else 0)
    tokens = extras + (model.img_size // model.patch_size) ** 2
    if tokens > attention.LONGEST:
        reasons.append(f"its attention takes at most {attention.LONGEST} tokens, got {tokens}")
    if model.skip == "add":
        reasons.append("skips that are added (model.skip=add) go through no product")
    if reasons := [reason for reason in reasons if reason]:
        reasons += ["expected bf16"] if device is None or device.type == "cuda" else []  # a CPU has neither
        raise UserError(f"sample.precision=fp8: {'; '.join(reasons)}")
    _kept(model.depth, keep)


def _kept(depth: int, keep: Sequence[str]) -> frozenset[str]:
    names = parts(depth)
    return frozenset(name for pattern in keep for name in fitting(pattern, names, "sample.fp8_keep"))


class Fp8UViT(Replayed):
    """The noise prediction network eps(x_t, t, c) derived from a trained one, and called like it; without gradients.

    Calls replay themselves, as `UViT`'s do.

    Args:
        net: in bf16, on the device that will run it.
        by: what computes the e4m3 products: the kernels, or, for comparison, `fp8_block.REFERENCE`, anywhere.
        keep: names or patterns of `parts` that stay in bf16; a block's name means all of it, "out_blocks.-1" the last
            one.

    Raises:
        UserError: as `check`; a network of another dtype, or with a changed block (hooks, LoRA, ...).
    """

    kernels = "fused"  # its own products, whatever the network's setting is

    def __init__(self, net: UViT, by: fp8_block.Arithmetic = fp8_block.KERNELS, keep: Sequence[str] = FP8_KEEP):
        super().__init__()
        check(net, net.pos_embed.device if by is fp8_block.KERNELS else None, keep)
        if net.pos_embed.dtype != torch.bfloat16:
            raise UserError(f"sample.precision=fp8: expected a network in bfloat16, got {net.pos_embed.dtype}")
        if hooked(net) or hooked_everywhere():
            raise UserError("sample.precision=fp8: the network has hooks, which would not be called; expected bf16")
        self.net, self.by, self.names, kept = net, by, block_names(net.depth), _kept(net.depth, keep)
        self.layers = [_derived(name, block, kept) for name, block in zip(self.names, net.blocks)]

    def calibrate(self, run: Callable[[], object]) -> None:
        """Round the weights anew, those of a layer with regard to each other, for the inputs that the products have
        while `run` calls this network. A layer whose inputs are not finite stays as it is.
        """
        seen: dict[int, Inputs] = {}
        before = self.by, self.cuda_graphs
        self.by, self.cuda_graphs = fp8_block.watching(self.by, seen), False
        try:
            run()
        finally:
            self.by, self.cuda_graphs = before
        self.captures.clear()
        for kind in Layers._fields:  # one at a time, as all are larger than the network
            inputs = [seen.pop(id(getattr(each, kind)), None) for each in self.layers]
            met = {i: each for i, each in enumerate(inputs) if each and each.products.isfinite().all()}
            exact = [fp8_block.unrounded(*_taken(self.names[i], self.net.blocks[i]))[kind]() for i in met]
            for i, layer in zip(met, compensated(exact, [*met.values()]) if met else []):
                self.layers[i] = self.layers[i]._replace(**{kind: layer})

    def fixed_weights(self) -> AbstractContextManager[None]:
        """As `UViT.fixed_weights`: what is derived from the layers in bf16 is derived once."""
        return self.net.fixed_weights()

    @torch.no_grad()
    @replays
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Predict the noise: see `UViT.forward`."""
        net, last = self.net, len(self.layers) - 1
        tokens = net.tokens(x, t, y, context)  # (B, L, D)
        shape = tokens.shape
        h = Stream(tokens.reshape(-1, shape[2]))  # (B * L, D), as everything in the stream
        skips: list[Tensor] = []  # of the first half, each in the form that its reader takes
        for i, (block, layers) in enumerate(zip(net.blocks, self.layers)):
            if block.skip_linear is not None:
                h = self._joined(h, skips.pop(), block, layers, shape)
            h = self._attended(i, h, cache, shape)
            # a linear layer over a skip reads e4m3 alone, if it is in e4m3, and the last layer bf16 alone
            reader, following = self._reader(i), self.layers[i + 1].skip if i != last else None
            shared = reader is not None and reader.skip is None  # the stream is a skip too
            h = self._through_mlp(i, h, cache, shape, wide=shared or following is None, narrow=i != last)
            if shared:
                h = fp8_block.summed(h, self.by)._replace(free=False)
                skips.append(h.wide)
            elif reader is not None:
                h = fp8_block.narrowed(h, self.by)
                skips.append(h.narrow)
        h = fp8_block.summed(h, self.by)
        return net.noise(h.wide.view(shape), h.sums, x.dtype)

    def _reader(self, i: int) -> Layers | None:
        """Return the layers of the block that receives block i's output by a long skip, or None."""
        far = len(self.layers) - 1 - i
        return self.layers[far] if i < far and self.net.blocks[far].skip_linear is not None else None

    def _joined(self, h: Stream, skip: Tensor, block: Block, layers: Layers, shape: torch.Size) -> Stream:
        if layers.skip is not None:
            return fp8_block.joined(h, skip, layers, self.by)
        h = fp8_block.summed(h, self.by)
        return _stream(block.joined(h.wide.view(shape), skip.view(shape), h.sums, block._layers()[0]))

    def _attended(self, i: int, h: Stream, cache: Cache | None, shape: torch.Size) -> Stream:
        block, layers = self.net.blocks[i], self.layers[i]

        def compute(h: Stream) -> Stream:
            if layers.qkv is not None:
                return fp8_block.attended(h, layers, shape[0], self.net.num_heads, self.by)
            h = fp8_block.summed(h, self.by)
            return _stream(block.attended(h.wide.view(shape), h.sums, *block._layers()[1:3]))

        return self._cached(f"{self.names[i]}.attn", h, cache, shape, compute)

    def _through_mlp(
        self, i: int, h: Stream, cache: Cache | None, shape: torch.Size, *, wide: bool, narrow: bool
    ) -> Stream:
        block, layers, name = self.net.blocks[i], self.layers[i], f"{self.names[i]}.mlp"
        wide = wide or (cache is not None and cache.wants(name))

        def compute(h: Stream) -> Stream:
            if layers.fc1 is not None:
                return fp8_block.through_mlp(h, layers, wide=wide, narrow=narrow, by=self.by)
            h = fp8_block.summed(h, self.by)
            return _stream(block.through_mlp(h.wide.view(shape), h.sums, block._layers()[3]))

        return self._cached(name, h, cache, shape, compute)

    def _cached(
        self, name: str, h: Stream, cache: Cache | None, shape: torch.Size, compute: Callable[[Stream], Stream]
    ) -> Stream:
        """Return h with a sublayer's output, which `compute` adds, or that of another evaluation (`model.cached`).

        Args:
            shape: (B, L, D), as outputs are kept.
        """
        if cache is not None and (reused := cache.find(name, shape[0])) is not None:
            return fp8_block.plus(h, reused.view_as(h.wide), self.by)
        if cache is None or not cache.wants(name):
            return compute(h)
        before = fp8_block.summed(h, self.by)
        after = compute(before._replace(free=False))
        cache.leave(name, before.wide.view(shape), after.wide.view(shape))
        return after


def _stream(by_block: tuple[Tensor, Tensor | None]) -> Stream:
    """Return the stream after a part in bf16: (B, L, D) and its sums."""
    wide, sums = by_block
    return Stream(wide.reshape(-1, wide.shape[-1]), None, sums)


def _taken(name: str, block: Block) -> tuple[Any, ...]:
    """Return a block's layers, as `fp8_block.unrounded` takes them."""
    skip, attention, proj, rest = block._layers()
    if not (attention and rest and (skip or block.skip_linear is None)):
        raise UserError(
            f"sample.precision=fp8: {name} was changed (hooks, LoRA, ...), which the kernels would not call; "
            "expected bf16"
        )
    return *attention, proj, *rest, skip, block.attn.num_heads


def _derived(name: str, block: Block, kept: frozenset[str]) -> Layers:
    layers = fp8_block.derive(*_taken(name, block))
    for part, fields in (("skip_linear", ("skip",)), ("attn", ("qkv", "proj")), ("mlp", ("fc1", "fc2"))):
        if f"{name}.{part}" in kept:
            layers = layers._replace(**dict.fromkeys(fields))
    return layers
