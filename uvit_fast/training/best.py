"""The EMA weights with the lowest figure so far."""

import json
import math
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class Best:
    """best/ema.safetensors and best/figures.json of a run. The figure that decides is the first; lower is better."""

    def __init__(self, run_dir: Path):
        self.folder = Path(run_dir) / "best"

    def offer(self, weights: dict[str, Tensor], figures: dict[str, float], step: int) -> bool:
        """Keep these weights if none were better and their figure is a number; both files are replaced whole, the weights first."""
        name = next(iter(figures))
        known = self.folder / "figures.json"
        if not math.isfinite(figures[name]):
            return False
        if known.exists() and json.loads(known.read_text())[name] <= figures[name]:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        new = {path: path.with_name(path.name + ".new") for path in (self.folder / "ema.safetensors", known)}
        save_file(weights, new[self.folder / "ema.safetensors"])
        new[known].write_text(json.dumps({"step": step, **figures}, indent=2) + "\n")
        for path, temporary in new.items():
            os.replace(temporary, path)
        return True
