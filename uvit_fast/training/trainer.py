"""The training loop (paper, Section 2 and Appendix): predict the noise, or the objective's other target, with AdamW,
warm-up and EMA.

A step draws all its random numbers from one generator on the device, seeded by (seed, step), for the whole batch, of
which each micro-batch takes its rows: there is no random state to save, and a continued run, on however many ranks,
equals one that was never interrupted. Nothing in a step makes the host wait while the device has nothing queued, except
DeepSpeed under ZeRO-3 (it reads the gradient norm), with an offloaded optimizer, and between the accumulated
micro-batches of several GPUs.
"""

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.data.datasets import Dataset
from uvit_fast.diffusion.noise import Draws, seed_from
from uvit_fast.diffusion.objective import Objective
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import host_group, start
from uvit_fast.training import activations
from uvit_fast.training.engine import Engine, computes_in_bf16
from uvit_fast.training.folder import describe_run, set_aside, unwritable
from uvit_fast.training.frozen import freeze
from uvit_fast.training.held_out import HeldOut
from uvit_fast.training.initial import start_of
from uvit_fast.training.interrupt import GRACE, Interrupt, Stalled
from uvit_fast.training.loader import DataError, Order, batches
from uvit_fast.training.looks import Looks, Measure, Preview
from uvit_fast.training.monitor import Mark, Monitor, forward_flops, rate, require_wandb, say
from uvit_fast.training.rows import Rows
from uvit_fast.training.saves import Saves
from uvit_fast.training.spikes import Spikes


class Trainer:
    """A run, from the newest intact checkpoint in its folder to `config.train.iterations`.

    Args:
        config: everything that decides the result.
        model: fp32 `model(x, t, y=None, context=None)` -> the objective's prediction; the engine takes it over.
        dataset: the training data.
        run_dir: the run's folder.
        preview: `preview(model with EMA weights, step, folder)`, called every `sample_every` steps on rank 0; the image
            file that it returns is shown in TensorBoard too.
        measure: `measure(model with EMA weights, step)` -> figures by name, called every `evaluate.every` steps on rank
            0, while the others wait. The weights with the lowest first figure are kept in best/.
        fresh: rename an existing folder and begin anew, once everything but the folder is known to work.
        held_out: data not trained on, whose loss all ranks measure every `evaluate.every` steps; it becomes the last
            figure.

    Raises:
        UserError: no such GPU, a batch that does not divide, activations over their budget, initial weights that do not
            fit, a folder that another process trains in or that cannot be written to, a checkpoint of another
            architecture or of other classes or encoders, or none intact.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        objective: Objective,
        dataset: Dataset,
        run_dir: Path,
        preview: Preview | None = None,
        measure: Measure | None = None,
        fresh: bool = False,
        held_out: Dataset | None = None,
    ):
        train = config.train
        self.config, self.objective, self.dataset, self.run_dir = config, objective, dataset, Path(run_dir)
        self.world = start(config.device)
        self.main = self.world.rank == 0
        provenance = Provenance.of(dataset, config.model.num_classes > 0, config.diffusion.meaning)
        self.beginning = start_of(config, model, provenance, self.run_dir, fresh, self.world)
        freeze(model, train.trainable)
        device, flops = self.world.device, None
        if device.type == "cuda" and train.trainable == ("all",):  # otherwise a step does not cost three forwards
            flops = forward_flops(model, config)
        self.looks = Looks(
            model, self.run_dir, device, torch.bfloat16 if computes_in_bf16(train, device) else torch.float32,
            preview if train.sample_every and self.main else None, measure if config.evaluate and self.main else None,
            None if held_out is None else HeldOut(held_out, self._error, self.world, config.data.num_workers),
        )  # fmt: skip
        self._monitor: Monitor | None = None  # rank 0's, while it trains
        self._interrupt: Interrupt | None = None  # while it trains
        if train.activation_memory_gb:
            activations.share_out(train.activation_memory_gb * 1e9, model, config, self.world, self._say)
        self.engine = Engine(model, config, self.world)
        self.generator = torch.Generator(device)
        null = dataset.null_context
        self.null_context = None if null is None else null.to(device)
        self.raw: dict[str, Tensor] | None = None  # the last batch
        self.dry = False  # whether the data stalled, so that there are no more batches
        self.done = False  # whether the last step has been taken, by all ranks
        if train.wandb:
            self.world.on_first(require_wandb)
        self.saves = Saves(config, self.engine, self.run_dir, provenance, self._say)
        if fresh:
            self.world.on_first(lambda: set_aside(self.run_dir))
        self.step, self.samples = self.saves.resume(self.beginning and self.beginning.weights)
        self.beginning = self.beginning and self.beginning._replace(weights={})  # to free them
        self.first = (self.step, self.samples)  # where this call begins
        spikes = Spikes(train.spike_deviations, self._samples_of, self.run_dir / "spikes.jsonl")
        self.rows = Rows(config, self.world, flops, spikes, self._write_row, self.step)

    def train(self) -> dict[str, float]:
        """Train to the end.

        Returns:
            "step", "seconds" and "images_per_second" of this call and, on a GPU, if it trained, "peak_memory_gb",
            "static_memory_gb" and "reserved_memory_gb" of this rank: the most that was allocated, what stays allocated
            between two steps, and the most that the process reserved.

        Raises:
            UserError: `train.max_refused` steps in a row had no finite gradient, or the last checkpoint could not be
                written.
        """
        iterations = self.config.train.iterations
        if self.step >= iterations:
            done = f"{self.run_dir}: finished, {self.step} of {iterations} steps"
            self._say(f"{done}; a larger train.iterations goes on with it, --fresh starts it anew")
            return {"step": self.step, "seconds": 0.0, "images_per_second": 0.0}
        self._say_what_to_expect()
        with self._running() as (stream, interrupt):
            began = Mark(self.world.device)
            while self.step < iterations and not interrupt.asked():
                try:
                    self._step(stream)
                except Stalled:
                    break
                self.done = self.step == iterations and interrupt.settle() == 0
                self._save_if_due()  # before anything else can fail
                self._look_if_due()
                self._log_if_due()
            seconds = self._finish(began)
        return self._report(seconds)

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None, "rank 0 has one, while it trains"
        return self._monitor

    @property
    def interrupt(self) -> Interrupt:
        assert self._interrupt is not None, "there is one while it trains"
        return self._interrupt

    def _due(self, every: int) -> bool:
        """Return whether what happens every so many steps (0: never), and after the last one, is due."""
        return every > 0 and (self.done or self.step % every == 0)

    def _save_if_due(self) -> None:
        """Save if due, unless training is diverging: that checkpoint would displace a good one."""
        if not self._due(self.config.train.checkpoint_every):
            return
        self._end_row()
        self.rows.read(wait=True)
        if self._diverged() or (self.rows.in_a_row and not self.done):
            self._say(f"step {self.step}: no checkpoint while gradients are not finite: it would displace a good one")
        else:
            self._save()

    def _look_if_due(self) -> None:
        evaluate = self.config.evaluate
        show, judge = self._due(self.config.train.sample_every), evaluate is not None and self._due(evaluate.every)
        if not (show or judge):
            return
        self._end_row()
        self.rows.read()
        weights = self.engine.weights(self.engine.ema.values)  # on all ranks
        figures = self.looks.held_out_loss(weights, self._overdue) if judge else {}
        self.world.on_first(
            lambda: self.looks.look(weights, self.step, show, judge, figures, self.monitor, self.interrupt)
        )
        self.rows.restart_clock()

    def _log_if_due(self) -> None:
        if self._due(self.config.train.log_every):
            self._end_row()
        self.rows.read()
        self.interrupt.wanted = self._diverged()

    def _end_row(self) -> None:
        """End a row where one is due, and before other work: its images/s count training alone."""
        self.rows.end(self.step, self.learning_rate(self.step - 1), self.engine.grad_norm)

    def _diverged(self) -> bool:
        """Return whether too many steps in a row had no finite gradient."""
        return self.rows.most_refused >= self.config.train.max_refused

    def _say_what_to_expect(self) -> None:
        train, engine = self.config.train, self.engine
        if self.beginning and self.step == 0:
            self._say(self.beginning.line)
        if train.trainable != ("all",):
            sizes = {name: math.prod(shape) for name, shape in engine.shapes.items()}
            learning = sum(sizes[name] for name, _ in engine.learning)
            others = "" if train.init else ", and the others stay as initialised: there is no train.init"
            self._say(f"{learning:,} of {sum(sizes.values()):,} parameters are trained{others}")
        if engine.bf16 and engine.accumulation > 1 and engine.stage == 1:
            self._say("train.zero_stage 1 accumulates gradients in bf16; 2 and 3 do it in fp32")
        untrained = train.ema_decay**train.iterations
        if untrained > 0.05:
            held, kind = ("train.init's", " of these data") if train.init else ("the initial", "")
            self._say(
                f"after {train.iterations} steps the EMA still holds {untrained:.0%} of {held} weights: "
                f"for samples{kind}, train longer or with a smaller train.ema_decay"
            )
        if self.dataset.synthetic:
            self._say("synthetic data: measures speed and memory, learns nothing")

    @contextlib.contextmanager
    def _running(self) -> Iterator[tuple[Iterator[dict[str, Tensor]], Interrupt]]:
        """Yield a run's batches and its signals, while it holds its folder and its screen."""
        self.world.on_first(self._open_folder)
        self._interrupt = Interrupt(host_group() if self.world.size > 1 else None)
        stream = self.stream()
        self.first = (self.step, self.samples)
        self.rows.restart_clock()
        try:
            yield stream, self.interrupt
        finally:
            stream.close()
            self.interrupt.close()
            self.saves.close()
            if self.main:
                self.monitor.close()

    def _finish(self, began: Mark) -> float:
        """End the last row, save if anything is unsaved, and return the seconds since `began`.

        Raises:
            UserError: the gradients were not finite, or the last checkpoint could not be written.
        """
        void = self.interrupt.settle()
        self._take_back(void)
        self._end_row()
        self.rows.read(wait=True)
        if self._diverged() and not void:  # by now on every rank
            raise UserError(
                f"step {self.step}: loss or gradient not finite for {self.rows.most_refused:.0f} steps in a row, "
                "stopped without another checkpoint; a lower train.lr or train.grad_clip=1 may help, and "
                "where the newest "
                "checkpoint is of weights that had diverged, removing it"
            )
        seconds = Mark(self.world.device).seconds_since(began)
        if self.step > self.saves.step:
            self._save()
        if not self.saves.finish():
            raise UserError(f"{self.run_dir}: the last checkpoint could not be written")
        return seconds

    def _report(self, seconds: float) -> dict[str, float]:
        """Return `train`'s result, and print it."""
        speed = (self.step - self.first[0]) * self.config.train.batch_size / seconds
        result, memory = {"step": self.step, "seconds": seconds, "images_per_second": speed}, ""
        if self.world.device.type == "cuda":
            result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            result["static_memory_gb"] = torch.cuda.memory_allocated() / 1e9
            result["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
            peak, static, reserved = (result[f"{what}_memory_gb"] for what in ("peak", "static", "reserved"))
            memory = f", peak memory {peak:.2f} GB per GPU, {static:.2f} GB of it static, {reserved:.2f} GB reserved"
        if self.step < self.config.train.iterations:
            signal = self.interrupt.name or "a signal to another rank"
            self._say(f"stopped by {signal} at step {self.step}; the same command continues")
        self._say(f"{self.step} steps, {seconds:.0f} s, {rate(speed)}{memory}: {self.run_dir}")
        return result

    def _open_folder(self) -> None:
        """Open the monitor, and write what describes the run.

        Raises:
            UserError: the folder cannot be written to. ImportError: wandb is not installed.
        """
        wandb = self.config.model_dump(mode="json") if self.config.train.wandb else None
        try:
            self._monitor = Monitor(self.run_dir, self.step, self.config.train.iterations, wandb)
            record = self.beginning and self.beginning.record
            describe_run(self.run_dir, self.config, self.world, self.saves.provenance, record)
        except OSError as error:
            raise unwritable(self.run_dir, error) from None

    def stream(self) -> Generator[dict[str, Tensor], None, None]:
        """Yield this rank's batches, from where the run is to its end, or until data stalls after a signal."""
        engine, train, world = self.engine, self.config.train, self.world
        order = Order(
            len(self.dataset), train.seed, engine.micro_batch, engine.accumulation,
            world.rank, world.size, self.samples, train.iterations - self.step,
        )  # fmt: skip
        return batches(self.dataset, order, self.config.data.num_workers, world.device, self._overdue)

    def _step(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """Take one optimizer step. The host waits for nothing but data.

        Raises:
            Stalled: there is no data, on a single rank. With several, the others wait for this rank's share of the
                step: it contributes a loss of NaN, which makes the step void on all of them, since their gradient is
                not finite: nothing changes, and they count it.
        """
        engine, row = self.engine, self.rows.row
        for k in range(engine.accumulation):
            waits_since = time.perf_counter()
            if not self.dry:
                self._draw(stream)
            row.waited += time.perf_counter() - waits_since
            assert self.raw is not None
            loss = self.loss(self.raw, self.step, k)
            if self.dry:
                loss = loss * torch.nan
            engine.backward(loss)
            engine.step(self.learning_rate(self.step))
            row.add_loss(self.step, loss.detach())
        if self.dry:
            self.interrupt.void += 1
        self.rows.add_step(engine.refused)
        self.step += 1
        self.samples += self.config.train.batch_size
        if self._monitor is not None:
            self._monitor.advance(self.step)

    def _draw(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """Take the next batch, or the previous one if there are no more."""
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
        """Uncount the last `steps`, which were void: they changed nothing."""
        self.step -= steps
        self.samples -= steps * self.config.train.batch_size
        self.rows.row.refused -= steps

    def learning_rate(self, step: int) -> float:
        """Return lr * min(step / warmup, 1): the first step's rate is 0."""
        train = self.config.train
        return train.lr * min(step / train.warmup_steps, 1.0) if train.warmup_steps else train.lr

    def loss(self, raw: dict[str, Tensor], step: int, k: int) -> Tensor:
        """Return the loss of this rank's k-th micro-batch of a step, 0-d fp32."""
        train, before = self.config.train, (k * self.world.size + self.world.rank) * self.engine.micro_batch
        draws = Draws(self.generator.manual_seed(seed_from(train.seed, step)), train.batch_size, before)
        batch = self.dataset.finish(raw, draws)
        x_0 = batch["x"]  # (B, C, H, W)
        u, noise = draws.rand(len(x_0)), draws.randn(*x_0.shape)  # (B,), (B, C, H, W)
        drop = draws.rand(len(x_0)) < train.p_uncond  # (B,)
        conditions, null = conditions_of(self.config, batch), self.config.null_label
        if null is not None:
            conditions["y"] = conditions["y"].masked_fill(drop, null)
        if train.p_uncond and "context" in conditions:
            assert self.null_context is not None
            conditions["context"] = torch.where(drop[:, None, None], self.null_context, conditions["context"])
        return self.objective.loss(self.engine, x_0, noise, u, **conditions)

    def _error(self, network: nn.Module, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss of another network, at given times and with all conditions."""
        return self.objective.loss_at(network, batch["x"], noise, t, **conditions_of(self.config, batch))

    def _write_row(self, scalars: dict[str, float], remarks: list[str]) -> None:
        self.monitor.row(scalars)
        for line in remarks:
            self.monitor.say(line)

    def _samples_of(self, step: int) -> list[int]:
        """Return the dataset's indices in the batch that ended with this step of this call."""
        train, (first_step, first_sample) = self.config.train, self.first
        whole = Order(len(self.dataset), train.seed, train.batch_size, 1, 0, 1, 0, 1)
        indices = [i for i, _ in whole.pairs(first_sample + (step - 1 - first_step) * train.batch_size)]
        numbers = self.dataset.numbers
        return indices if numbers is None else numbers[indices].tolist()

    def _save(self) -> None:
        self.saves.start(self.step, self.samples)
        self.rows.restart_clock()

    def _overdue(self) -> bool:
        """Return whether, after a signal, waiting should end."""
        return self._interrupt is not None and self._interrupt.overdue()

    def _say(self, text: str) -> None:
        if self.main:
            (self._monitor.say if self._monitor else say)(text)


def conditions_of(config: Config, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs that the network takes beside x: y (B,) int64, or context (B, T, C) fp32."""
    taken = {"y": config.model.num_classes, "context": config.model.context_dim}
    return {name: batch[name] for name, size in taken.items() if size}
