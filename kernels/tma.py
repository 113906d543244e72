"""Tensor descriptors for TMA: how a kernel on sm_90 is told of a tensor in memory."""

import functools

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    """A view of t, of 16-bit values, for boxes of this shape, which lie in shared memory in the widest swizzle that fits."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block), layout(block))


@functools.cache  # making one costs the host as much as a launch
def layout(block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    """The layout of such a box."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
