"""The tuning tables: which tile, how many warps or programs, and whose product, by architecture, case and width."""

import functools
import json
from pathlib import Path

import torch

from uvit_fast.kernels.runtime.device import architecture

FEW = ("few", "fp8_few")  # cases whose entries are case:NxK:tokens, each for itself: operands in bf16, in e4m3
_FOLDER = Path(__file__).parent / "tables"


def path(arch: int) -> Path:
    """Return the file of an architecture's tuning table."""
    return _FOLDER / f"sm_{arch}.json"


@functools.cache
def table(arch: int) -> dict:
    """Return the tuning table of the nearest architecture that has one: case -> choices, and "default"."""
    known = sorted(int(file.stem.removeprefix("sm_")) for file in _FOLDER.glob("sm_*.json"))
    nearest = min(known, key=lambda a: abs(a - arch))
    return json.loads(path(nearest).read_text())


def choice(device: torch.device, case: str, width: int | str) -> dict:
    """Return the tuned choices of a case: those of this width (or NxK), if any, before the case's and the defaults."""
    found = table(architecture(device))
    return found["default"] | found.get(case, {}) | found.get(f"{case}:{width}", {})


def few(device: torch.device, case: str, N: int, K: int, tokens: int) -> dict:
    """Return the tuned choice for a product (tokens, K) x (K, N) of few tokens; {} if nothing similar was tuned.

    It is the choice of the next larger measured number of tokens, whose tiles these fill at most as well; not if that
    is far away.

    Args:
        case: of `FEW`.
    """
    choices, case = table(architecture(device)), f"{case}:{N}x{K}:"
    exact = choices.get(f"{case}{tokens}")
    if exact is not None:
        return exact
    known = {int(key.removeprefix(case)): chosen for key, chosen in choices.items() if key.startswith(case)}
    nearest = min((measured for measured in known if tokens <= measured <= 1.5 * tokens), default=None)
    return {} if nearest is None else known[nearest]
