"""Choose a network's trainable parameters (`train.trainable`); the others are frozen and have no optimizer state."""

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase

import torch.nn as nn

from uvit_fast.runtime.errors import UserError


def freeze(model: nn.Module, trainable: Collection[str]) -> None:
    """Make the parameters that `trainable` names trainable, and freeze all others.

    Args:
        trainable: names of parameters or modules, with * and ? as in a shell; "all".

    Raises:
        UserError: a name that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in trainable:
        if not any(_names(pattern, name) for name in names):
            modules = [name for name, _ in model.named_modules() if name]
            near = difflib.get_close_matches(pattern, [*modules, *names], n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected all, or some as {', '.join(names[:3])}"
            raise UserError(f"train.trainable: no parameter is called {pattern}; {hint}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(_names(pattern, name) for pattern in trainable))


def _names(pattern: str, name: str) -> bool:
    return pattern == "all" or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
