"""Detect modules changed from outside: hooks, another forward, a wrapped or quantised layer.

Code that reads a layer's weights instead of calling it, or that records a network's launches, would bypass all of
these.
"""

from typing import Any

import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d)
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two replace weights in tracing
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module itself
_MAKERS = ("torch", "uvit_fast", "diffusers", "transformers")  # packages whose modules are known only to compute


def plain_weights(*layers: nn.Module, bias: bool = True) -> tuple[Any, ...] | None:
    """Return the weight and bias of each Linear, LayerNorm (of eps 1e-5) or Conv2d, one after the other, if calling
    them does no more than their formula: if they are of exactly that class, without hooks, with plain tensors.
    Otherwise return None: they must be called. It costs as much as reading the weights.

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
    """Return whether calling the module does something other than its class's forward."""
    has = module.__dict__
    if has["_forward_hooks"] or has["_forward_pre_hooks"] or has["_backward_hooks"] or has["_backward_pre_hooks"]:
        return True  # HOOKS, written out: this runs for every layer in every call
    return "forward" in has or "_conv_forward" in has


def hooked_everywhere() -> bool:
    """Return whether global hooks are registered, which every module calls."""
    return bool(_has_any_global_hook())


def changed(network: nn.Module, inside: bool = False) -> str | None:
    """Describe the first module of `network` that may run Python code which a recording of the network's launches would
    not repeat; None if there is none.

    Args:
        inside: leave out the network itself.
    """
    if hooked_everywhere():
        return "every module has a hook"
    home = type(network).__module__.partition(".")[0]
    known = {home, *_MAKERS} - {"peft"}  # peft wraps other packages' networks
    for name, module in network.named_modules():
        if inside and module is network:
            continue
        if hooked(module) and not hasattr(module, "_orig_mod"):  # torch.compile's wrapper
            return f"{name or 'the network'} has hooks, or a forward of its own"
        kind = type(module)
        if kind.__module__.partition(".")[0] not in known:
            return f"{name or 'the network'} is a {kind.__module__}.{kind.__name__}"
    return None
