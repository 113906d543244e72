"""Modules that were changed from outside: hooks, another forward, a wrapped or quantised layer.

Code that reads a layer's weights in place of calling it, or that records what a network launches, would pass all of these by.
"""

from typing import Any

import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d)
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two are what tracing puts in a weight's place
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module's own
_MAKERS = ("torch", "uvit_fast", "diffusers", "transformers")  # packages whose modules are known to compute and no more


def plain_weights(*layers: nn.Module, bias: bool = True) -> tuple[Any, ...] | None:
    """Weight and bias of each Linear, LayerNorm (of eps 1e-5) or Conv2d, one after the other, if calling them is no more than their formula
    on these: of exactly that class, without hooks, plain tensors. None otherwise: they must be called. It costs what reading them costs.

    Args:
        bias: False: one may be missing.
    """
    found: tuple[Tensor | None, ...] = ()
    for layer in layers:
        kind, has = type(layer), layer._parameters
        if kind not in _LAYERS or "weight" not in has or hooked(layer) or (kind is nn.LayerNorm and layer.eps != 1e-5):
            return None
        weight, offset = has["weight"], has["bias"]
        if type(weight) not in _PLAIN or (type(offset) not in _PLAIN and (bias or offset is not None)):
            return None
        found += weight, offset
    return found


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward, or something else."""
    has = module.__dict__
    if has["_forward_hooks"] or has["_forward_pre_hooks"] or has["_backward_hooks"] or has["_backward_pre_hooks"]:
        return True  # HOOKS, written out: this is called for every layer of every call
    return "forward" in has or "_conv_forward" in has


def hooked_everywhere() -> bool:
    """Whether hooks are registered that every module calls."""
    return bool(_has_any_global_hook())


def changed(network: nn.Module, inside: bool = False) -> str | None:
    """The first module of `network` that may run Python which a recording of the network's launches would not repeat, in words.

    Args:
        inside: leave out the network itself.
    """
    if hooked_everywhere():
        return "every module has a hook"
    home = type(network).__module__.partition(".")[0]
    known = {home, *_MAKERS} - {"peft"}  # which wraps the networks of others
    for name, module in network.named_modules():
        if inside and module is network:
            continue
        if hooked(module) and not hasattr(module, "_orig_mod"):  # torch.compile's wrapper
            return f"{name or 'the network'} has hooks, or a forward of its own"
        kind = type(module)
        if kind.__module__.partition(".")[0] not in known:
            return f"{name or 'the network'} is a {kind.__module__}.{kind.__name__}"
    return None
