"""What a run shows and leaves behind: progress bar, metrics.jsonl, TensorBoard, speed and MFU."""

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from uvit_fast.config import Config
from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.files import append_row, read_rows, write_whole
from uvit_fast.runtime.progress import Bar
from uvit_fast.training.activations import example

# Dense bf16 FLOP/s from the data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
SECONDS_BETWEEN_LINES = 10.0


class Monitor:
    """Rank 0's screen and files. On a full disk, what cannot be written costs its row and a line on the screen, not the
    run.

    Args:
        run_dir: gets metrics.jsonl and TensorBoard's events.
        step, total: where the run starts and ends, in optimizer steps. Older rows beyond `step` are dropped: they
            belong to a continuation that was lost.
        wandb: the configuration to show in Weights & Biases; None: do not log there.

    Raises:
        ImportError: wandb is not installed; the message names the extra.
    """

    def __init__(self, run_dir: Path, step: int, total: int, wandb: dict[str, Any] | None = None):
        package = None if wandb is None else require_wandb()
        self.total, self.start, self.step, self.run_dir = total, step, step, run_dir
        self.began = self.last_line = time.perf_counter()
        self.text, self.shown = "", -1  # of the last line: its figures, its step
        for path in (run_dir / "evaluation.jsonl", run_dir / "metrics.jsonl"):
            if path.exists():
                kept = "".join(json.dumps(row) + "\n" for row in read_rows(path) if row.get("step", math.inf) <= step)
                write_whole(path, partial(Path.write_text, data=kept))
        self.board: Any = None  # TensorBoard's writer, made when needed
        self.purge = step + 1  # a board's rows from this step on are void
        self.wandb = None if wandb is None else _start(package, run_dir, wandb)
        self.bar = None
        if sys.stderr.isatty():
            wide = os.get_terminal_size(sys.stderr.fileno()).columns  # 0 on some pseudo-terminals
            size = {"dynamic_ncols": True} if wide else {"ncols": 100, "nrows": 24}
            self.bar = Bar(what="train", unit="steps", total=total, done=step, **size)

    def advance(self, step: int) -> None:
        """Show that a step was given to the device."""
        self.step = step
        if self.bar is not None:
            self.bar.update(1)
        elif time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def row(self, row: dict[str, float]) -> None:
        """Write a step's scalars: "step", "loss", "images_per_second" and any others."""
        step = int(row["step"])
        if self._write(
            lambda: append_row(self.run_dir / "metrics.jsonl", row)
        ):  # TensorBoard's thread would complain at length
            self._show(lambda board: [board.add_scalar(name, row[name], step) for name in row if name != "step"])
        if self.wandb is not None:
            self.wandb.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        first = not self.text
        self.text = f"loss {row['loss']:.4f}  {rate(row['images_per_second'])}"
        if self.bar is not None:
            self.bar.set_postfix_str(self.text, refresh=False)
        elif first:
            self._line()

    def figures(self, figures: dict[str, float], step: int) -> None:
        """Write an evaluation's figures: a line, TensorBoard, evaluation.jsonl."""
        self._show(lambda board: [board.add_scalar(f"evaluation/{name}", figures[name], step) for name in figures])
        if self.wandb is not None:
            self.wandb.log({f"evaluation/{name}": value for name, value in figures.items()}, step=step)
        self._write(lambda: append_row(self.run_dir / "evaluation.jsonl", {"step": step, **figures}))
        self.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.write(text, file=sys.stderr)
        else:
            say(text)

    def picture(self, path: Path, step: int) -> None:
        """Show an image file in TensorBoard."""
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        self._show(lambda board: board.add_image("samples", pixels, step, dataformats="HWC"))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.text and self.shown < self.step:
            self._line()
        if self.board is not None:
            self._show(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.finish()

    def _write(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except OSError as error:
            self.say(f"step {self.step}: not written to {self.run_dir}: {error}")
            return False
        return True

    def _show(self, show: Callable[[Any], object]) -> None:
        """Call `show(board)`; a board that failed to write never writes again, and the next call makes a new one."""
        from torch.utils.tensorboard import SummaryWriter

        def on_the_board() -> None:
            if self.board is None:
                self.board = SummaryWriter(self.run_dir, purge_step=self.purge)
            show(self.board)

        if not self._write(on_the_board):
            self.board, self.purge = None, self.step

    def _line(self) -> None:
        self.last_line, self.shown = time.perf_counter(), self.step
        done = max(1, self.step - self.start)
        left = (self.last_line - self.began) / done * (self.total - self.step)
        clock = f"{int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d}"
        say("  ".join(filter(None, (f"step {self.step}/{self.total}", self.text, f"{clock} left"))))


def require_wandb() -> Any:
    """Return the package.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        import wandb
    except ImportError:
        raise missing("train.wandb", "wandb", "wandb") from None
    return wandb


def _start(wandb: Any, run_dir: Path, config: dict[str, Any]) -> Any:
    name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]  # the same when the run continues
    return wandb.init(project="uvit-fast", name=run_dir.name, id=name, resume="allow", dir=run_dir, config=config)


def say(text: str) -> None:
    """Print a line for the user, to stderr, where progress bars go. A terminal may close before the run ends."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def rate(images_per_second: float) -> str:
    """Format images per second, with three digits or more."""
    return f"{images_per_second:.{0 if images_per_second >= 100 else 1 if images_per_second >= 10 else 2}f} images/s"


class Reading:
    """Device scalars on their way to the host; nothing waits for them.

    Args:
        values: (n,) fp32 on the device.
    """

    def __init__(self, values: Tensor):
        self.time = Mark(values.device)
        if values.device.type == "cuda":
            self.host = torch.empty(values.shape, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.arrived: torch.cuda.Event | None = torch.cuda.current_stream().record_event()
        else:
            self.host, self.arrived = values.clone(), None

    def ready(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def read(self) -> list[float]:
        """Return the values; wait for them if need be."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


class Mark:
    """A point in the device's queue of work."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()
        self.time = time.perf_counter()

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the seconds between two marks; the device must have reached both."""
        if self.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        assert earlier.event is not None
        return earlier.event.elapsed_time(self.event) / 1e3


def forward_flops(model: nn.Module, config: Config) -> float | None:
    """Count the FLOPs (2 per multiply-add) of the matrix products of one image's forward pass; None where they cannot
    be counted.

    Counted on the meta device, where every op is the PyTorch reference.
    """
    meta = {name: p.detach().to("meta") for name, p in model.named_parameters()}
    inputs, conditions = example(config.model, 1, "meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(model, meta, inputs, conditions)
    except (RuntimeError, ValueError, NotImplementedError):  # an op that requires a GPU
        return None
    return float(counter.get_total_flops())


def utilisation(images_per_second: float, flops: float | None, device: torch.device, ranks: int) -> dict[str, float]:
    """Return each GPU's "tflops_per_gpu", and "mfu" if its peak is known; nothing on a CPU.

    FLOP/s per GPU = 3 x forward FLOPs per image x images/s / ranks. 3: the backward of a matrix product is two of them;
    recomputed activations do not count. MFU is that over the device's dense bf16 peak.
    """
    if flops is None or device.type != "cuda":
        return {}
    per_gpu = 3 * flops * images_per_second / ranks
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    return {"tflops_per_gpu": per_gpu / 1e12, **({"mfu": per_gpu / peak} if peak else {})}
