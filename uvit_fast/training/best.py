"""The EMA weights with the best figure so far."""

import json
import math
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from uvit_fast.runtime.files import write_whole


class Best:
    """best/ema.safetensors and best/figures.json of a run. The first figure decides; lower is better."""

    def __init__(self, run_dir: Path):
        self.folder = Path(run_dir) / "best"

    def offer(self, weights: dict[str, Tensor], figures: dict[str, float], step: int) -> bool:
        """Keep these weights if no earlier ones had a lower figure and theirs is not NaN; files are replaced whole, the
        weights first.
        """
        name = next(iter(figures))
        known = self.folder / "figures.json"
        if not math.isfinite(figures[name]):
            return False
        if self._known(known, name) <= figures[name]:
            return False
        write_whole(self.folder / "ema.safetensors", lambda path: save_file(weights, path))
        write_whole(known, lambda path: path.write_text(json.dumps({"step": step, **figures}, indent=2) + "\n"))
        return True

    @staticmethod
    def _known(file: Path, name: str) -> float:
        """Infinity where the file does not say it, as after a power cut."""
        try:
            return float(json.loads(file.read_text()).get(name, math.inf))
        except (OSError, ValueError, TypeError, AttributeError):
            return math.inf
