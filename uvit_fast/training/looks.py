"""Looks at the EMA weights while a run trains: sample grids and figures of evaluations."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.training.best import Best
from uvit_fast.training.interrupt import Interrupt, Stalled, ticking
from uvit_fast.training.monitor import Monitor

Preview = Callable[[nn.Module, int, Path], Path | None]
Measure = Callable[[nn.Module, int], dict[str, float]]


class Looks:
    """What rank 0 makes of the EMA weights, in a copy of the model that is on the device for that time only.

    Args:
        model: what is copied, before the engine takes it over.
        run_dir: gets samples/ and best/.
        device, dtype: what the weights are looked at on and in.
        preview, measure: the trainer's.
    """

    def __init__(
        self,
        model: nn.Module,
        run_dir: Path,
        device: torch.device,
        dtype: torch.dtype,
        preview: Preview | None,
        measure: Measure | None,
    ):
        self.run_dir, self.device, self.dtype, self.preview, self.measure = run_dir, device, dtype, preview, measure
        self.model = copy.deepcopy(model).eval() if preview or measure else None

    def look(
        self, weights: dict[str, Tensor], step: int, show: bool, judge: bool, monitor: Monitor, interrupt: Interrupt
    ) -> None:
        """Hand `weights` to `preview` (`show`) and to `measure` (`judge`), where there is one. A checkpoint is worth
        more than what has not ended some seconds after a signal, which is left off.
        """
        if self.model is None:
            return

        def leave_off(_: float) -> None:
            if interrupt.overdue():
                raise Stalled

        self.model.load_state_dict(weights)
        self.model.to(self.device, self.dtype)
        try:
            with ticking(leave_off):
                if show and self.preview:
                    self._show(step, monitor)
                if judge and self.measure:
                    figures = self.measure(self.model, step)
                    monitor.figures(figures, step)
                    Best(self.run_dir).offer(weights, figures, step)
        except Stalled:
            monitor.say(f"step {step}: samples or figures were left off after {interrupt.name}")
        except OSError as error:  # a full disk
            monitor.say(f"step {step}: samples or figures were not written: {error}")
        self.model.to("cpu", torch.float32)

    def _show(self, step: int, monitor: Monitor) -> None:
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        picture = self.preview(self.model, step, folder)
        if picture:
            monitor.picture(picture, step)
