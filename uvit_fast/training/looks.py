"""Evaluate the EMA weights while a run trains: sample grids, figures, the held-out loss."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from uvit_fast.training.best import Best
from uvit_fast.training.held_out import HeldOut
from uvit_fast.training.interrupt import Interrupt, Stalled, ticking
from uvit_fast.training.monitor import Monitor

Preview = Callable[[nn.Module, int, Path], Path | None]
Measure = Callable[[nn.Module, int], dict[str, float]]


class Looks:
    """Evaluations of the EMA weights, by rank 0 or, for the held-out loss, by all ranks, in a copy of the model that is
    on the device only meanwhile.

    Args:
        model: copied before the engine takes it over.
        run_dir: gets samples/ and best/.
        device, dtype: where and in which precision the weights are evaluated.
        preview, measure: the trainer's.
        held_out: measures a loss, on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        run_dir: Path,
        device: torch.device,
        dtype: torch.dtype,
        preview: Preview | None,
        measure: Measure | None,
        held_out: HeldOut | None = None,
    ):
        self.run_dir, self.device, self.dtype, self.preview, self.measure = run_dir, device, dtype, preview, measure
        self.held_out = held_out
        self.model = copy.deepcopy(model).eval() if preview or measure or held_out else None

    def held_out_loss(self, weights: dict[str, Tensor], overdue: Callable[[], bool]) -> dict[str, float]:
        """Return the figure `held_out_loss` of rank 0's `weights`, unless it was given up. All ranks must call it."""
        if self.held_out is None or self.model is None:
            return {}
        self.model.to(self.device, self.dtype)
        for name, parameter in self.model.named_parameters():
            value = weights[name].to(self.device) if weights else torch.empty(parameter.shape, device=self.device)
            if dist.get_world_size() > 1:
                dist.broadcast(value, src=0)
            parameter.data.copy_(value)
        loss = self.held_out.loss(self.model, overdue)
        self.model.to("cpu", torch.float32)
        return {} if loss is None else {"held_out_loss": loss}

    def look(
        self,
        weights: dict[str, Tensor],
        step: int,
        show: bool,
        judge: bool,
        figures: dict[str, float],
        monitor: Monitor,
        interrupt: Interrupt,
    ) -> None:
        """Pass `weights` to `preview` (if `show`) and to `measure` (if `judge`), and write the figures, together with
        those given. A checkpoint matters more than an evaluation that is still running some seconds after a signal:
        that is dropped.
        """
        if self.model is None:
            return

        def leave_off(_: float) -> None:
            if interrupt.overdue():
                raise Stalled

        drawn: dict[str, float] = {}
        try:
            if (show and self.preview) or (judge and self.measure):
                self.model.load_state_dict(weights)
                self.model.to(self.device, self.dtype)
                with ticking(leave_off):
                    if show and self.preview:
                        self._show(step, monitor)
                    if judge and self.measure:
                        drawn = self.measure(self.model, step)
        except Stalled:
            monitor.say(f"step {step}: samples or figures were given up after {interrupt.name}")
        except OSError as error:  # a full disk
            monitor.say(f"step {step}: samples or figures were not written: {error}")
        self.model.to("cpu", torch.float32)
        if judge and self.held_out and not figures:
            monitor.say(f"step {step}: the held-out loss was given up after a signal")
        if figures := {**drawn, **figures}:
            monitor.figures(figures, step)
            if drawn or not self.measure:  # otherwise the first figure is not that of other steps
                self._keep_best(weights, figures, step, monitor)

    def _keep_best(self, weights: dict[str, Tensor], figures: dict[str, float], step: int, monitor: Monitor) -> None:
        try:
            Best(self.run_dir).offer(weights, figures, step)
        except OSError as error:
            monitor.say(f"step {step}: the best weights were not written: {error}")

    def _show(self, step: int, monitor: Monitor) -> None:
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        assert self.preview and self.model
        picture = self.preview(self.model, step, folder)
        if picture:
            monitor.picture(picture, step)
