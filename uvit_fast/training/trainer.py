"""The training loop (paper, Section 2 and Appendix): predict the noise, or what else the objective asks for, AdamW, warm-up, EMA.

A step draws everything random from one generator on the device, seeded by (seed, step), for the whole batch, of which a micro-batch takes
its rows: there is no random state to save, and a run that continues, on however many ranks, is the run that was never interrupted.
Nothing in a step makes the host wait for a device that has nothing queued, but for DeepSpeed under ZeRO-3 (it looks at the gradient
norm), with an offloaded optimizer, and between the accumulated micro-batches of several GPUs.
"""

import copy
import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.diffusion.noise import Draws
from uvit_fast.diffusion.objective import Objective, mse_loss
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import RankError, UserError
from uvit_fast.runtime.processes import host_group, start
from uvit_fast.training import activations, checkpoint
from uvit_fast.training.best import Best
from uvit_fast.training.engine import Engine, batch_plan, computes_in_bf16
from uvit_fast.training.folder import claim, describe_run, set_aside
from uvit_fast.training.interrupt import GRACE, Interrupt, Stalled, ticking
from uvit_fast.training.loader import DataError, Order, batches
from uvit_fast.training.monitor import Mark, Monitor, Reading, forward_flops, rate, require_wandb, say, utilisation
from uvit_fast.training.row import Row
from uvit_fast.training.spikes import Spikes

SLOW_DATA = 0.5  # share of the time that the host waits for data, above which the loader is named as the slow part
Preview = Callable[[nn.Module, int, Path], Path | None]
Measure = Callable[[nn.Module, int], dict[str, float]]


class Trainer:
    """A run, from the newest intact checkpoint in its folder to `config.train.iterations`.

    Args:
        config: everything that decides the result.
        model: fp32 `model(x, t, y=None, context=None)` -> what `objective` asks for; taken over by the engine.
        dataset: as in `uvit_fast.data.datasets`.
        run_dir: the run's folder.
        preview: `preview(model with EMA weights, step, folder)` every `sample_every` steps, on rank 0; the image file that it
            returns is shown in TensorBoard too.
        measure: `measure(model with EMA weights, step)` every `evaluate.every` steps, on rank 0, while the others wait: figures by
            name. The weights with the lowest of the first one stay in best/.
        fresh: rename what is in the folder and begin anew, once all but the folder is known to work.

    Raises:
        UserError: a GPU that is not there, a batch that does not divide, activations that do not fit their budget, a folder that
            another process trains in or that cannot be written to, a checkpoint of another architecture, of other classes or
            encoders, or none intact.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        objective: Objective,
        dataset: Any,
        run_dir: Path,
        preview: Preview | None = None,
        measure: Measure | None = None,
        fresh: bool = False,
    ):
        self.config, self.objective, self.dataset, self.run_dir = config, objective, dataset, Path(run_dir)
        self.world = start(config.device)
        self.main = self.world.rank == 0
        self.flops = forward_flops(model, config) if self.world.device.type == "cuda" else None
        self.preview = preview if config.train.sample_every and self.main else None
        self.measure = measure if config.evaluate and self.main else None
        self.ema_model = copy.deepcopy(model).eval() if self.preview or self.measure else None
        self.monitor: Monitor | None = None
        if config.train.activation_memory_gb:
            self._plan_activations(model, config.train.activation_memory_gb * 1e9)
        self.engine = Engine(model, config, self.world)
        self.generator = torch.Generator(self.world.device)
        null_context = getattr(dataset, "null_context", None)
        self.null_context = None if null_context is None else null_context.to(self.world.device)
        train = config.train
        self.writer = checkpoint.Writer(
            self.run_dir / "checkpoints", train.keep_checkpoints, self._say, train.keep_every
        )
        self.pending: tuple[Reading, Row, int] | None = None
        self.refused_in_a_row = torch.zeros((), device=self.world.device)
        self.step = self.samples = self.saved = 0
        self.interrupt: Interrupt | None = None  # while it trains
        self.raw: dict[str, Tensor] | None = None  # the last batch
        self.dry = False  # whether there are no more, the data having stalled
        self.in_a_row = self.most_refused = 0.0  # refused steps: at the end of the last row that was read, and so far
        if train.wandb:
            self.world.on_first(require_wandb)
        self.provenance = Provenance.of(dataset, config.model.num_classes > 0, config.diffusion.meaning)
        self._agree()
        if fresh:
            self.world.on_first(lambda: set_aside(self.run_dir))
        self._resume()

    def train(self) -> dict[str, float]:
        """Train to the end.

        Returns:
            "step", "seconds" and "images_per_second" of this call, and on a GPU, if it trained, "peak_memory_gb", "static_memory_gb"
            and "reserved_memory_gb" of this rank: the most that was allocated, what stays allocated between two steps, and the most
            that the process held of the device.

        Raises:
            UserError: `train.max_refused` steps in a row had no finite gradient, or the last checkpoint could not be written.
        """
        config, train, engine = self.config, self.config.train, self.engine
        if self.step >= train.iterations:
            self._say(f"{self.run_dir}: finished, {self.step} of {train.iterations} steps; --fresh starts it anew")
            return {"step": self.step, "seconds": 0.0, "images_per_second": 0.0}
        if engine.bf16 and engine.accumulation > 1 and engine.stage == 1:
            self._say("train.zero_stage 1 accumulates gradients in bf16; 2 and 3 do it in fp32")
        untrained = train.ema_decay**train.iterations
        if untrained > 0.05:
            self._say(
                f"after {train.iterations} steps the EMA still holds {untrained:.0%} of the initial weights: for samples, train "
                "longer or with a smaller train.ema_decay"
            )
        if getattr(self.dataset, "synthetic", False):
            self._say("synthetic data: measures speed and memory, learns nothing")
        self.world.on_first(self._open_folder)
        self.spikes = Spikes(train.spike_deviations, self._samples_of, self.run_dir / "spikes.jsonl")
        self.first = (self.step, self.samples)
        self.interrupt = interrupt = Interrupt(host_group() if self.world.size > 1 else None)
        stream = self.stream()
        first_step, begin = self.step, Mark(self.world.device)
        self.row = Row(self.step, train.log_every, self.world.device)
        try:
            while self.step < train.iterations and not interrupt.asked():
                try:
                    self._step(stream)
                except Stalled:
                    break
                done = self.step == train.iterations and interrupt.settle() == 0
                save = done or self.step % train.checkpoint_every == 0  # before what others may fail at
                show = train.sample_every > 0 and (done or self.step % train.sample_every == 0)
                judge = config.evaluate is not None and (done or self.step % config.evaluate.every == 0)
                # a row ends where other work begins, so that images/s is the training's
                if save or show or judge or done or self.step % train.log_every == 0:
                    self._start_row()
                self._finish_row(wait=save)
                interrupt.wanted = broken = self.most_refused >= train.max_refused
                if save and (broken or (self.in_a_row and not done)):
                    self._say(f"step {self.step}: no checkpoint while gradients are not finite: older ones would go")
                elif save:
                    self._save()
                if show or judge:
                    self._look_at_ema(show, judge)
            void = interrupt.settle()
            self._take_back(void)
            stopped = self.step < train.iterations
            if self.row.first_step < self.step:
                self._start_row()
            self._finish_row(wait=True)
            if self.most_refused >= train.max_refused and not void:  # by now on every rank
                raise UserError(
                    f"step {self.step}: loss or gradient not finite for {self.most_refused:.0f} steps in a row, stopped "
                    "without another checkpoint; a lower train.lr or train.grad_clip=1 may help, and where the newest checkpoint "
                    "is of weights that had diverged, removing it"
                )
            seconds = Mark(self.world.device).seconds_since(begin)
            if self.step > self.saved:
                self._save()
            if self.main and not self.writer.finish():
                raise UserError(f"{self.run_dir}: the last checkpoint could not be written")
        finally:
            stream.close()
            interrupt.close()
            if self.main:
                self.writer.finish()
                self.monitor.close()
                self.claim.release()

        result = {"step": self.step, "seconds": seconds}
        result["images_per_second"] = (self.step - first_step) * train.batch_size / seconds
        memory = ""
        if self.world.device.type == "cuda":
            result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            result["static_memory_gb"] = torch.cuda.memory_allocated() / 1e9
            result["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
            memory = f", peak memory {result['peak_memory_gb']:.2f} GB a GPU, {result['static_memory_gb']:.2f} GB of it static"
            memory += f", {result['reserved_memory_gb']:.2f} GB reserved"
        if stopped:
            signal = interrupt.name or "a signal to another rank"
            self._say(f"stopped by {signal} at step {self.step}; the same command continues")
        speed = rate(result["images_per_second"])
        self._say(f"{self.step} steps, {seconds:.0f} s, {speed}{memory}: {self.run_dir}")
        return result

    def _open_folder(self) -> None:
        """The monitor, and what describes the run.

        Raises:
            UserError: the folder cannot be written to. ImportError: wandb is not installed.
        """
        wandb = self.config.model_dump(mode="json") if self.config.train.wandb else None
        try:
            self.monitor = Monitor(self.run_dir, self.step, self.config.train.iterations, wandb)
            describe_run(self.run_dir, self.config, self.world, self.provenance)
        except OSError as error:
            raise UserError(f"{self.run_dir}: expected a folder to write the run to: {error}") from None

    def stream(self) -> Iterator[dict[str, Tensor]]:
        """This rank's batches, from where the run is to its end, or until data stalls after a signal."""
        engine, train, world = self.engine, self.config.train, self.world
        order = Order(
            len(self.dataset), train.seed, engine.micro_batch, engine.accumulation,
            world.rank, world.size, self.samples, train.iterations - self.step,
        )  # fmt: skip
        return batches(self.dataset, order, self.config.data.num_workers, world.device, self._overdue)

    def _step(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step. The host waits for nothing but data.

        Raises:
            Stalled: there are none, alone. With others, who wait for this rank's share of the step, it is of no finite loss, which
                makes the step void on all of them, since their gradient is not finite: nothing changes, and they count it.
        """
        engine, row = self.engine, self.row
        for k in range(engine.accumulation):
            waits_since = time.perf_counter()
            if not self.dry:
                self._draw(stream)
            row.waited += time.perf_counter() - waits_since
            loss = self.loss(self.raw, self.step, k)
            if self.dry:
                loss = loss * torch.nan
            engine.backward(loss)
            engine.step(self.learning_rate(self.step))
            row.add_loss(self.step, loss.detach())
        if self.dry:
            self.interrupt.void += 1
        refused = engine.refused
        row.refused += refused
        self.refused_in_a_row = (self.refused_in_a_row + refused) * refused
        row.longest = torch.maximum(row.longest, self.refused_in_a_row)
        self.step += 1
        self.samples += self.config.train.batch_size
        if self.main:
            self.monitor.advance(self.step)

    def _draw(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """The next batch, or the one before once there are no more."""
        try:
            self.raw = next(stream)
        except Stalled:
            say(f"no batch within {GRACE} s of {self.interrupt.name}: ending with step {self.step}")
            if self.world.size == 1:
                raise
            if self.raw is None:
                raise DataError(f"{self.run_dir}: no data for the first step") from None
            self.dry = True

    def _take_back(self, steps: int) -> None:
        """The last `steps` were void: they changed nothing."""
        self.step -= steps
        self.samples -= steps * self.config.train.batch_size
        self.row.refused -= steps

    def learning_rate(self, step: int) -> float:
        """lr * min(step / warmup, 1): the first step's rate is 0."""
        train = self.config.train
        return train.lr * min(step / train.warmup_steps, 1.0) if train.warmup_steps else train.lr

    def loss(self, raw: dict[str, Tensor], step: int, k: int) -> Tensor:
        """`mse_loss` of this rank's k-th micro-batch of a step, 0-d fp32."""
        train, before = self.config.train, (k * self.world.size + self.world.rank) * self.engine.micro_batch
        draws = Draws(self.generator.manual_seed(mix(train.seed, step)), train.batch_size, before)
        batch = self.dataset.finish(raw, draws)
        x_0 = batch["x"]  # (B, C, H, W)
        u, noise = draws.rand(len(x_0)), draws.randn(*x_0.shape)  # (B,), (B, C, H, W)
        task = self.objective(x_0, noise, u)
        drop = draws.rand(len(x_0)) < train.p_uncond  # (B,)
        conditions = {}
        if self.config.model.num_classes:
            conditions["y"] = batch["y"].masked_fill(drop, self.config.null_label) if train.p_uncond else batch["y"]
        if self.config.model.context_dim:
            text = batch["context"]  # (B, T, C)
            conditions["context"] = (
                torch.where(drop[:, None, None], self.null_context, text) if train.p_uncond else text
            )
        output = self.engine(task.x_t, task.time, **conditions)  # (B, C, H, W)
        return mse_loss(output, task.target, task.weight)

    def _start_row(self) -> None:
        """Send the scalars since the last row on their way to the host."""
        self._finish_row(wait=True)
        row, losses = self.row, self.row.over_ranks(self.step)  # (2, steps)
        mean = losses.sum(1)
        scalars = [mean[0] / mean[1], self.engine.grad_norm, row.refused, row.longest, self.refused_in_a_row]
        reading = Reading(torch.cat([torch.stack(scalars), losses[0] / losses[1]]))
        self.pending = (reading, row, self.step)
        self.row = Row(self.step, self.config.train.log_every, self.world.device, reading.time)

    def _finish_row(self, wait: bool) -> None:
        """Write the row that is under way, once its scalars have arrived."""
        if self.pending is None or not (wait or self.pending[0].ready()):
            return
        reading, row, step = self.pending
        self.pending = None
        loss, grad_norm, refused, longest, self.in_a_row, *losses = reading.read()
        self.most_refused = max(self.most_refused, longest)
        if self.main:
            seconds = reading.time.seconds_since(row.began)
            speed = (step - row.first_step) * self.config.train.batch_size / seconds
            scalars = {"step": step, "loss": loss, "lr": self.learning_rate(step - 1), "grad_norm": grad_norm}
            scalars["images_per_second"] = speed
            scalars |= utilisation(speed, self.flops, self.world.device, self.world.size)
            scalars["data_wait"] = row.waited / seconds
            if scalars["data_wait"] > SLOW_DATA:
                share = f"{scalars['data_wait']:.0%}"
                self.monitor.say(f"step {step}: {share} of the time went into waiting for data; see data.num_workers")
            if refused:
                scalars["refused"] = refused
                self.monitor.say(
                    f"step {step}: {refused:.0f} of {step - row.first_step} steps skipped, gradient not finite"
                )
            self.monitor.row(scalars)
            for number, value in enumerate(losses, row.first_step + 1):
                if line := self.spikes.look(number, value):
                    self.monitor.say(line)

    def _samples_of(self, step: int) -> list[int]:
        """The dataset's indices in the batch that ended with this step of this call."""
        train, (first_step, first_sample) = self.config.train, self.first
        whole = Order(len(self.dataset), train.seed, train.batch_size, 1, 0, 1, 0, 1)
        return [i for i, _ in whole.pairs(first_sample + (step - 1 - first_step) * train.batch_size)]

    def _plan_activations(self, model: nn.Module, budget: float) -> None:
        """Choose what each block keeps for the backward; the same on every rank."""
        micro_batch, _ = batch_plan(self.config.train, self.world.size)
        dtype = torch.bfloat16 if computes_in_bf16(self.config.train, self.world.device) else torch.float32

        def plan() -> activations.Plan:
            network = activations.inspect(model, self.config.model, micro_batch, self.world.device, dtype)
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()  # of the copy that was looked at
            chosen = activations.plan_within(budget, network)
            self._say(activations.describe(chosen, network, budget))
            return chosen

        for block, policy in zip(model.blocks, self.world.on_first(plan)):
            block.checkpointing = policy

    def _parts(self) -> dict[str, Tensor]:
        return {"model": self.engine.partition, **self.engine.moments(), "ema": self.engine.ema.values}

    def _save(self) -> None:
        """Start a checkpoint. All ranks gather, rank 0 writes, beside the training."""
        parts = {name: self.engine.gather(flat) for name, flat in self._parts().items()}
        state = {
            "samples": self.samples,
            "adam_step": self.engine.adam_step,
            "world_size": self.world.size,
            "zero_stage": self.engine.stage,
            "config": self.config.model_dump(mode="json"),
            "data": self.provenance.as_json(),
        }
        if self.main:
            self.writer.submit(self.step, parts, state)
        self.saved = self.step
        self.row.began = Mark(self.world.device)

    def _resume(self) -> None:
        """Continue from the newest intact checkpoint, if there is one. Rank 0 reads, all ranks get their share."""

        def look() -> tuple[Path, dict[str, Any]] | None:
            self.claim = claim(self.run_dir)
            found = checkpoint.newest_intact(self.run_dir / "checkpoints", say)
            if found:
                checkpoint.check_whole(*found)
                checkpoint.check_model(found[0], self.engine.shapes, self.config.model_dump(mode="json"), found[1])
                self.provenance = checkpoint.check_data(found[0], self.provenance)
                checkpoint.set_aside_newer(found[0])
            return found

        found = self.world.on_first(look)
        if found is None:
            return
        path, manifest = found
        for name, flat in self._parts().items():
            self.engine.scatter(checkpoint.read(path, name) if self.main else {}, flat)
        self.engine.adam_step = manifest["adam_step"]
        self.engine.refresh()
        self.step, self.samples, self.saved = manifest["step"], manifest["samples"], manifest["step"]
        if self.step < self.config.train.iterations:
            other = checkpoint.other_settings(self.config.model_dump(mode="json"), manifest)
            self._say(f"continuing from {path}" + (f", with {other}" if other else ""))

    def _agree(self) -> None:
        """Refuse data whose labels or latents mean something else than those of rank 0."""
        first = self.world.on_first(lambda: self.provenance)
        if difference := first.difference(self.provenance):
            raise RankError(f"rank {self.world.rank}: its data are not those of rank 0: {difference}")

    def _look_at_ema(self, show: bool, judge: bool) -> None:
        """Hand the EMA weights to `preview` and `measure`, in a copy of the model that is on the device for that time only."""
        weights = self.engine.gather(self.engine.ema.values)  # by all ranks

        def look() -> None:
            if self.ema_model is None:
                return
            self.ema_model.load_state_dict(weights)
            self.ema_model.to(self.world.device, torch.bfloat16 if self.engine.bf16 else torch.float32)
            try:
                with ticking(self._leave_off):
                    if show and self.preview:
                        folder = self.run_dir / "samples"
                        folder.mkdir(exist_ok=True)
                        picture = self.preview(self.ema_model, self.step, folder)
                        if picture:
                            self.monitor.picture(picture, self.step)
                    if judge and self.measure:
                        figures = self.measure(self.ema_model, self.step)
                        self.monitor.figures(figures, self.step)
                        Best(self.run_dir).offer(weights, figures, self.step)
            except Stalled:
                self._say(f"step {self.step}: samples or figures were left off after {self.interrupt.name}")
            except OSError as error:  # a full disk
                self._say(f"step {self.step}: samples or figures were not written: {error}")
            self.ema_model.to("cpu", torch.float32)

        self.world.on_first(look)
        self.row.began = Mark(self.world.device)

    def _overdue(self) -> bool:
        """Whether nothing should be waited for any longer, after a signal."""
        return self.interrupt is not None and self.interrupt.overdue()

    def _leave_off(self, _: float) -> None:
        """A checkpoint is worth more than what has not ended yet."""
        if self._overdue():
            raise Stalled

    def _say(self, text: str) -> None:
        if self.main:
            (self.monitor.say if self.monitor else say)(text)


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers, such that near numbers give unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
