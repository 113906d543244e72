"""Structures on the device: one value holding descriptors, pointers, buffers, numbers and constants by name."""

from typing import Any

from triton.language.core import _aggregate, base_value, constexpr, tensor


def aggregate(cls: type) -> type:
    """Turn a class with annotated fields into a single value for kernels.

    Its methods are `triton.jit` or `gluon.jit` functions, which take it as `self`. A field is annotated with its kind:
    `gl.tensor` (pointers, and numbers, also a launch's that became constants), `gl.shared_memory_descriptor`,
    `tma.tensor_descriptor`, another aggregate, `gl.tuple`, or `gl.constexpr`, which includes None: an optional field is
    `... | gl.constexpr`. Fields are given in order or by name.

    Triton has this under a private name, which its own Gluon tutorials use; 3.6 requires a constructor, 3.8 would make
    one. Tested with both.
    """
    fields = cls.__annotations__

    def __init__(self, *args: Any, _semantic: Any = None, **kwargs: Any) -> None:
        for name, value in {**dict(zip(fields, args, strict=False)), **kwargs}.items():
            if fields[name] is tensor and not isinstance(value, tensor):
                value = _semantic.to_tensor(value)
            setattr(self, name, value if isinstance(value, base_value) else constexpr(value))

    __init__.__triton_builtin__ = True  # nothing in it for a kernel's cache key to follow
    cls.__init__ = __init__
    return _aggregate(cls)
