"""What every sampler is: a list of stages, and the loop that runs them.

A stage evaluates the network once at the current state, then forms the next state as a linear combination of the
interval's first state and the outputs seen since: of x_0, of eps or of the velocity, whichever the solver takes,
converted from the network's own prediction. All coefficients depend on the schedule and the prediction alone: they are
float64 numbers before the loop starts, so that the loop is tensor algebra without a host sync, one fused kernel per
stage on a GPU.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from uvit_fast.diffusion.caching import LayerCache, Layers, Plan, layers
from uvit_fast.diffusion.guidance import ALWAYS, EpsFn, evaluate
from uvit_fast.diffusion.predictions import Noise, Prediction
from uvit_fast.diffusion.schedules import FlowSchedule, Schedule
from uvit_fast.kernels.ops.solver_step import Update, reference, solver_step, why_not

Generator = torch.Generator | Tensor  # one for the batch, or (B,) int64 keys of counter-based ones, one per sample
AS_IT_IS = (0.0, 1.0)  # the conversion of an output that needs none
SPACINGS = ("time", "logsnr", "karras")


@dataclass(frozen=True)
class Stage:
    """One network evaluation and the update that follows it."""

    t: float  # the schedule's time
    time: float  # as the network receives it
    update: Update  # from its output to the next state
    last: bool = True  # the next state begins a new interval
    layers: Layers | None = None  # what the network reuses and keeps


class Sampler(Protocol):
    """From noise to data in stages: `sampler(eps_fn, x_T)` -> x_0.

    Attributes:
        stages: one per network evaluation, in order; not to be changed, since requests share samplers.
        draws_noise: whether a generator is used.
        keep: outputs of earlier intervals that a new one still uses (1 for the multistep solver).
    """

    @property
    def stages(self) -> Sequence[Stage]: ...

    draws_noise: bool
    keep: int

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the network's times, (steps,), and the updates, (steps, 8), both fp32; made once per device."""

    def caching(self, plan: Plan) -> Self:
        """Return the same sampler with evaluations that reuse sublayers: its network must accept `cache`, as UViT does.

        Raises:
            ValueError: the plan is for another number of evaluations, or its first evaluation reuses anything.
        """

    def rehearsal(self, interval: tuple[float, float] = ALWAYS) -> Self:
        """Return the same sampler with only as many intervals as show each kind of stage: a warm-up for a capture, at
        the price of a few evaluations. Its samples mean nothing.

        Args:
            interval: of guidance; stages inside and outside it are of different kinds.
        """

    def __call__(
        self,
        eps_fn: EpsFn,
        x_T: Tensor,
        generator: Generator | None = None,
        callback: Callable[[int, int], None] | None = None,
        change: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Solve from x_T ~ N(0, I) to x_0.

        Args:
            eps_fn: eps_fn(x, t) -> eps, or whatever else the network predicts; x (B, C, H, W) fp32, t (B,) fp32, the
                network's time. A `Guidance` is combined inside the update.
            x_T: (B, C, H, W).
            generator: of the noise, for samplers that draw it: a torch.Generator for the batch, or the (B,) int64 keys
                of `sample_generators`, one per sample.
            callback: called as callback(done, steps) after each network evaluation.
            change: change(i, x) -> the state that replaces x (B, C, H, W) after evaluation i. Inside an interval of
                order 2 or 3 the network is evaluated there next; the interval's end still follows from its start.

        Returns:
            (B, C, H, W) fp32.

        Raises:
            ValueError: keys of the wrong shape or dtype.
        """


class Staged(Sampler):
    """The loop over stages; a subclass plans the stages.

    Args:
        steps: network evaluations.
        spacing: of the DPM-Solvers' times: "time", "logsnr" or "karras", see `Schedule.grid`; default: the schedule's
            own, as in the published samplers.
        prediction: what the network predicts; default: eps.
        shift: of a flow's times, if uniform in t, see `shifted`; 1: none.
    """

    keep = 0

    def __init__(
        self,
        schedule: Schedule,
        steps: int,
        spacing: str | None = None,
        prediction: Prediction | None = None,
        shift: float = 1.0,
    ):
        if steps < 1:
            raise ValueError(f"steps: expected at least 1 network evaluation, got {steps}")
        if spacing not in (None, *SPACINGS):
            raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")
        if shift != 1 and not (isinstance(schedule, FlowSchedule) and (spacing or schedule.spacing) == "time"):
            raise ValueError(f"shift: moves a flow's times that are uniform in t; expected 1 for others, got {shift}")
        self.prediction, self.shift = prediction or Noise(), shift
        self._stages = tuple(self._plan(schedule, steps, spacing))
        assert len(self.stages) == steps, "a sampler spends exactly the evaluations it was given"
        self.draws_noise = any(stage.update.noise for stage in self.stages)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def stages(self) -> Sequence[Stage]:
        return self._stages

    @abstractmethod
    def _plan(self, schedule: Schedule, steps: int, spacing: str | None) -> list[Stage]:
        """Return `steps` stages."""

    def _stage(self, schedule: Schedule, t, wanted, start, outputs, noise=0.0, last=True) -> Stage:
        """Return the stage at time t whose m is `wanted` of x_0 and eps; NumPy scalars become floats."""
        convert = self.prediction.convert(wanted, schedule.alpha(t), schedule.sigma(t))
        update = Update(*map(float, convert), float(start), float(noise), tuple(map(float, outputs)))
        return Stage(float(t), float(schedule.network_time(t)), update, last)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        made = self._tables.get(device)
        if made is None:
            with torch.inference_mode(False):  # kept, so usable in a later call with gradients
                times = torch.tensor([stage.time for stage in self.stages], dtype=torch.float32, device=device)
                rows = torch.tensor([stage.update.row() for stage in self.stages], dtype=torch.float32, device=device)
            made = times, rows
            if not is_in_torch_dispatch_mode():  # which may have made them fake
                self._tables[device] = made
        return made

    def caching(self, plan: Plan) -> Self:
        if len(plan) != len(self.stages):
            raise ValueError(f"cache: expected a plan of {len(self.stages)} evaluations, got {len(plan)}")
        if plan[0]:
            raise ValueError(f"cache: the first evaluation has nothing to reuse; got {', '.join(sorted(plan[0])[:3])}")
        planned = copy.copy(self)
        planned._stages = tuple(replace(stage, layers=each) for stage, each in zip(self.stages, layers(plan)))
        return planned

    def rehearsal(self, interval: tuple[float, float] = ALWAYS) -> Self:
        seen: set[tuple] = set()
        stages: list[Stage] = []
        group: list[Stage] = []
        for stage in self.stages:
            group.append(stage)
            if not stage.last:
                continue
            kinds = {
                (
                    len(s.update.outputs),
                    s.update[:2] == AS_IT_IS,
                    s.update.noise > 0,
                    s.last,
                    interval[0] <= s.t <= interval[1],
                    s.layers,
                )
                for s in group
            }
            if not kinds <= seen or len(stages) < 4:  # four, so that table rows of every alignment occur
                stages += group
            seen, group = seen | kinds, []
        short = copy.copy(self)
        short._stages, short._tables = tuple(stages), {}
        return short

    def __call__(
        self,
        eps_fn: EpsFn,
        x_T: Tensor,
        generator: Generator | None = None,
        callback: Callable[[int, int], None] | None = None,
        change: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        x = start = x_T.float()
        times, rows = self.tables(x.device)
        keys, source = (generator, None) if isinstance(generator, Tensor) else (None, generator)
        if keys is not None and (keys.dtype, keys.shape) != (torch.int64, x.shape[:1]):
            raise ValueError(f"generator: expected ({len(x)},) int64 keys, got {tuple(keys.shape)} {keys.dtype}")
        fused = why_not(x) is None
        outputs: list[Tensor] = []
        held: dict[str, Tensor] = {}
        for i, stage in enumerate(self.stages):
            cache = {"cache": LayerCache(held, *stage.layers)} if stage.layers else {}
            eps, scale = evaluate(eps_fn, x, times[i].expand(len(x)), stage.t, **cache)
            if fused and not (eps.requires_grad or x.requires_grad):
                keep = self.keep > 0 or not stage.last
                x, m = solver_step(stage.update, rows[i], eps, x, start, outputs, scale, keys, i, keep)
            else:
                x, m = reference(stage.update, eps, x, start, outputs, scale, keys, i)
            if stage.update.noise and keys is None:
                x = x + stage.update.noise * torch.randn(x.shape, device=x.device, generator=source)
            outputs.append(m)
            if change is not None:
                x = change(i, x)
            if stage.last:
                start, outputs = x, outputs[len(outputs) - self.keep :]
            if callback is not None:
                callback(i + 1, len(self.stages))
        return x
