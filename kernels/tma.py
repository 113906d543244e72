"""Tensor descriptors for TMA: how a kernel on sm_90 is told of a tensor in memory."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """A view of t, of 16-bit values, for boxes of this shape, which lie in shared memory in the widest swizzle that fits.

    t's first element is on a 16-byte boundary and its rows are multiples of 16 bytes apart.
    """
    made = object.__new__(TensorDescriptor)
    # The dataclass would check block and layout anew for each tensor, which takes the host as long as a launch.
    made.__dict__ = {**_box(block), "base": t, "shape": t.shape, "strides": t.stride(), "kind": (t.dtype, block)}
    return made


@functools.cache
def _box(block: tuple[int, ...]) -> dict:
    """The fields of a descriptor that do not depend on its tensor, checked."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    example = torch.empty(block, dtype=torch.bfloat16, device="meta")
    strides = [max(stride, 8) if i < len(block) - 1 else 1 for i, stride in enumerate(example.stride())]
    return dict(vars(TensorDescriptor(example, list(block), strides, list(block), layout)))
