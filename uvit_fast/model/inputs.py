"""What a network may be called with: an error of one sentence where something does not fit.

Only shapes, dtypes and devices are checked: reading a value would make the host wait for the GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)  # what an embedding accepts


def check_inputs(
    x: Any, t: Any, y: Any, context: Any, image: tuple[int | None, ...], num_classes: int, text: tuple[int, int] | None
) -> None:
    """Refuse inputs that do not fit a network eps(x, t, y, context).

    Args:
        image: (C, H, W) of x; None: any size.
        num_classes: rows of the label embedding; 0: the network takes no labels.
        text: tokens and width of the context; None: the network takes none.

    Raises:
        ValueError: what was expected and what was given, as in `UViT.forward`.
    """
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace does not see the fused kernels; expected torch.export.export(model, (x, t, ...))"
        )
    if not isinstance(x, Tensor) or x.dim() != 4 or any(n is not None and n != m for n, m in zip(image, x.shape[1:])):
        expected = ", ".join("any" if n is None else str(n) for n in image)
        raise ValueError(f"x: expected shape (B, {expected}), got {_what(x)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point type, got {x.dtype}")
    B = x.shape[0]  # len() would make it a constant of an exported program
    _check("t", t, (B,), x)
    if (y is None) != (num_classes == 0):
        wanted = f"labels of shape {(B,)}" if num_classes else "no labels: the model has no classes"
        raise ValueError(f"y: expected {wanted}, got {_what(y)}")
    if y is not None:
        _check("y", y, (B,), x)
        if y.dtype not in INTEGERS:
            raise ValueError(f"y: expected labels of int64 or int32, got {y.dtype}")
    if (context is None) != (text is None):
        wanted = f"text features of shape {(B, *text)}" if text else "no text: the model takes none"
        raise ValueError(f"context: expected {wanted}, got {_what(context)}")
    if text is not None:
        _check("context", context, (B, *text), x)


@contextlib.contextmanager
def labels_in_range(y: Tensor | None, num_classes: int) -> Iterator[None]:
    """Guard an embedding lookup: on a CPU, a label that the model does not have raises a ValueError that names it.

    On a GPU a device-side assertion reports it later, since nothing may wait for the GPU.
    """
    try:
        yield
    except IndexError:
        if y is None or ((0 <= y) & (y < num_classes)).all():
            raise
        wrong = [label for label in y.tolist() if not 0 <= label < num_classes]
        raise ValueError(f"y: expected labels from 0 to {num_classes - 1}, got {', '.join(map(str, wrong))}") from None


def _check(name: str, value: Any, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {_what(value)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected on {x.device}, where x is, got {value.device}")


def _what(value: Any) -> str:
    if value is None:
        return "none"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"{type(value).__name__} {str(value)[:80]}"
