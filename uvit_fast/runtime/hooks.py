"""Detect modules changed from outside: hooks, another forward, a wrapped or quantised layer.

Code that reads a layer's weights instead of calling it, or that records a network's launches, would bypass all of
these.
"""

from gc import get_referents
from operator import is_, itemgetter
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d)
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two replace weights in tracing
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module itself
_VALUES = (bool, int, float, str, tuple, type(None))  # types of settings
_HELD = ("_modules", "_parameters", "_buffers")  # a module's parts
_IDLE = nn.Module().__dict__.keys() - {*HOOKS, *_HELD}  # attributes that decide nothing without gradients
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


class Structure:
    """What a recording of a network's launches relies on: `stands` compares it in some tens of microseconds.

    It holds the network's modules and weights, but not the network.

    Args:
        whole: compare the network's own hooks and all of its attributes too, and hold it: the recording called it, not
            its forward.

    Attributes:
        weights: its parameters and buffers.
    """

    def __init__(self, network: nn.Module, whole: bool = False):
        self._modules = [m for m in network.modules() if whole or m is not network]
        self._dicts = [m.__dict__ for m in self._modules]
        self._hooks = [d[name] for d in self._dicts for name in HOOKS]
        self._held = [d[name] for name in _HELD for d in (network.__dict__, *self._dicts)]
        self._parts = get_referents(*self._held)
        self.weights = [part for part in self._parts if isinstance(part, Tensor)]
        values = (name for name, value in network.__dict__.items() if name in _HELD or type(value) in _VALUES)
        self._own = itemgetter(*(name for name in values if name not in _IDLE))
        self._before, self._attributes, self._settings = self._now(network), self._values(), self._decisive()

    def hooked(self) -> bool:
        return hooked_everywhere() or any(self._hooks)

    def stands(self, network: nn.Module) -> bool:
        """Return whether there is no hook, and no module, setting, weight or weight's address has changed."""
        parts = get_referents(*self._held)
        if len(parts) != len(self._parts) or not all(map(is_, parts, self._parts)):  # == would compare tensors
            return False
        try:
            if hooked_everywhere() or self._now(network) != self._before:
                return False
            if (attributes := self._values()) != self._attributes:
                if any(self._hooks) or self._decisive() != self._settings:
                    return False
                self._attributes = attributes  # what changed decides nothing, such as `training`
        except (KeyError, RuntimeError, ValueError):  # a setting is gone, or is another tensor or array
            return False
        return True

    def _now(self, network: nn.Module) -> tuple:
        pointers, strides = map(Tensor.data_ptr, self.weights), map(Tensor.stride, self.weights)
        return self._own(network.__dict__), list(map(type, self._modules)), list(pointers), list(strides)

    def _values(self) -> list:
        """Return the values of all attributes, then the hooks: one call in C, cheaper than to choose among them."""
        return get_referents(*self._dicts, *self._hooks)

    def _decisive(self) -> list[dict[str, Any]]:
        return [{name: d[name] for name in d.keys() - _IDLE} for d in self._dicts]
