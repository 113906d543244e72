"""Checkpoints between the ranks and the run's folder: resuming and saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from uvit_fast.config import Config
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.claims import Claim
from uvit_fast.runtime.errors import RankError
from uvit_fast.training import checkpoint
from uvit_fast.training.checkpoint import Tensors
from uvit_fast.training.engine import Engine
from uvit_fast.training.folder import claim
from uvit_fast.training.monitor import say


class Saves:
    """The checkpoints of one run.

    Args:
        config, engine: whose state is saved.
        run_dir: the run's folder.
        provenance: what labels and latents of this rank's data mean.
        tell: called with lines for the user.

    Attributes:
        step: of the newest checkpoint, or 0.
        provenance: of all data that the run has learned from, its checkpoint's included.

    Raises:
        RankError: this rank's data have another meaning than rank 0's.
    """

    def __init__(
        self, config: Config, engine: Engine, run_dir: Path, provenance: Provenance, tell: Callable[[str], None]
    ):
        self.config, self.engine, self.run_dir, self.provenance, self.tell = config, engine, run_dir, provenance, tell
        self.world = engine.world
        self.step = 0
        self._writer = checkpoint.Writer(
            run_dir / "checkpoints", config.train.keep_checkpoints, tell, config.train.keep_every
        )
        self._claim: Claim | None = None  # rank 0's, on the folder
        first = self.world.on_first(lambda: provenance)
        if difference := first.difference(provenance):
            raise RankError(f"rank {self.world.rank}: its data are not those of rank 0: {difference}")

    def resume(self, start: Tensors | None) -> tuple[int, int]:
        """Claim the folder for this run, and load its newest intact checkpoint, if there is one, into the engine: rank
        0 reads, all ranks get their share.

        Args:
            start: rank 0's weights from `train.init`, for a new run and its EMA.

        Returns:
            The step, and how many samples all ranks have taken so far; 0 and 0 for a new run.

        Raises:
            UserError: another process trains in the folder, no checkpoint is intact, or it is of another model or of
                other data.
        """
        config = self.config.model_dump(mode="json")

        def look() -> tuple[Path, dict[str, Any]] | None:
            self._claim = claim(self.run_dir)
            found = checkpoint.newest_intact(self.run_dir / "checkpoints", say)
            if found:
                checkpoint.check_model(found[0], self.engine.shapes, config, found[1])
                checkpoint.check_whole(*found, {name for name, _ in self.engine.learning}, self.config.train.trainable)
                self.provenance = checkpoint.check_data(found[0], self.provenance)
                checkpoint.set_aside_newer(found[0])
            return found

        found = self.world.on_first(look)
        if found is None:
            if self.config.train.init:
                self.engine.load(start or {})
                self.engine.scatter(start or {}, self.engine.ema.values)
            return 0, 0
        path, manifest = found
        read = lambda name: checkpoint.read(path, name) if self.world.rank == 0 else {}  # noqa: E731
        self.engine.load(read("model"))
        for name, flat in {"ema": self.engine.ema.values, **self.engine.moments()}.items():
            self.engine.scatter(read(name), flat)
        self.engine.adam_step = manifest["adam_step"]
        self.step = manifest["step"]
        if self.step < self.config.train.iterations:
            other = checkpoint.other_settings(config, manifest)
            self.tell(f"continuing from {path}" + (f", with {other}" if other else ""))
            if self.config.train.init not in (None, manifest["config"]["train"].get("init")):
                self.tell(f"train.init {self.config.train.init} is not read: the run has weights of its own")
            if seen := checkpoint.held_out_but_seen(config, manifest):
                self.tell(
                    f"evaluate.held_out: the run has already trained on {seen:,} of these images, so their loss is not "
                    "that of unseen ones"
                )
        return self.step, manifest["samples"]

    def start(self, step: int, samples: int) -> None:
        """Start a checkpoint: all ranks gather, rank 0 writes, beside training."""
        engine = self.engine
        parts = {"model": engine.weights(engine.partition), "ema": engine.weights(engine.ema.values)}
        parts |= {name: engine.gather(flat) for name, flat in engine.moments().items()}
        state = {
            "samples": samples,
            "adam_step": self.engine.adam_step,
            "world_size": self.world.size,
            "zero_stage": self.engine.stage,
            "config": self.config.model_dump(mode="json"),
            "data": self.provenance.as_json(),
        }
        if self.world.rank == 0:
            self._writer.submit(step, parts, state)
        self.step = step

    def finish(self) -> bool:
        """Wait for the checkpoint in progress; return whether it was written. Ranks other than 0 have none."""
        return self._writer.finish()

    def close(self) -> None:
        """Release the folder."""
        self._writer.finish()
        if self._claim is not None:
            self._claim.release()
