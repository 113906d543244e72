"""Steps whose loss stands out, with their samples: a way to find broken data.

Losses are inspected once they have reached the host for the log, never before.
"""

import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

from uvit_fast.runtime.files import append_row

WINDOW, FEWEST = 1000, 50  # recent losses that are compared with, and the fewest that suffice


class Spikes:
    """Find spikes among the losses, one per step.

    Args:
        deviations: standard deviations above the mean of recent losses that make a spike; 0: never.
        samples: `samples(step)` -> the dataset's indices in the batch of a step.
        path: file that gets one line of JSON per spike: "step", "loss", "mean", "deviation", "samples".
    """

    def __init__(self, deviations: float, samples: Callable[[int], list[int]], path: Path):
        self.deviations, self.samples, self.path = deviations, samples, path
        self.usual: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, loss: float) -> str | None:
        """Return a line for the user if the loss of `step` is a spike, which is then left out of the comparison."""
        if not (self.deviations and loss == loss):
            return None
        if len(self.usual) >= FEWEST:
            mean, deviation = statistics.fmean(self.usual), statistics.stdev(self.usual)
            if loss > mean + self.deviations * deviation:
                found = {
                    "step": step,
                    "loss": loss,
                    "mean": mean,
                    "deviation": deviation,
                    "samples": self.samples(step),
                }
                try:
                    append_row(self.path, found)
                    where = f"its samples: {self.path}"
                except OSError as error:
                    where = f"its samples were not written: {error}"
                return f"step {step}: loss {loss:.4g} where {mean:.4g} ± {deviation:.2g} is usual; {where}"
        self.usual.append(loss)
        return None
