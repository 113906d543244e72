"""U-ViT for diffusion (CVPR 2023): the published model, fast.

cfg = load_config("h2_256", overrides=["model.attention=math"])
model = build_model(cfg)          # model(x, t, y=None, context=None) -> eps; t: 999 t for VP, n for SD
objective = build_objective(cfg)  # objective(x_0, noise, u) -> x_t, t, target, weight (None: all alike)
sampler = build_sampler(cfg)      # sampler(eps_fn, x_T) -> x_0, with eps_fn(x, t_network)
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
_HOME = {
    "load_config": "config",
    "build_model": "build",
    "build_schedule": "build",
    "build_objective": "build",
    "build_sampler": "build",
    "build_dataset": "build",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `uvit_fast.config` alone stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'uvit_fast' has no attribute {name!r}")
    return getattr(import_module(f"uvit_fast.{_HOME[name]}"), name)
