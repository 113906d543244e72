"""A small world for the trainer: a model of a few hundred odd-sized parameters, a schedule, a dataset, and processes to
train in.

Every training run is a process of its own, since DeepSpeed and the process group are global; a fork server that has
imported everything once starts them in a moment.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.config import Config
from uvit_fast.data.datasets import Indexed
from uvit_fast.diffusion import schedules
from uvit_fast.diffusion.noise import Draws
from uvit_fast.diffusion.objective import Objective
from uvit_fast.training import deepspeed_adapter, interrupt
from uvit_fast.training.trainer import Trainer

IMAGE = (1, 4, 4)
PRELOAD = ["tests.training.tiny", "torch.utils.tensorboard", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
PRELOAD += ["uvit_fast.cli", "uvit_fast.measuring", "uvit_fast.sampling.previews", "sklearn.datasets"]


class Block(nn.Module):
    """Reads its children's weights itself, as the real one does: under ZeRO-3 it works as a leaf only."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias)
        return x + F.gelu(F.linear(h, self.fc.weight, self.fc.bias))


class TinyModel(nn.Module):
    block_class = Block
    fused_classes = [Block]

    def __init__(self, dim: int = 23, classes: int = 4, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.label_emb = nn.Embedding(classes, dim)
        self.first = nn.Linear(17, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(3))
        self.last = nn.Linear(dim, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        assert t.dtype == torch.float32, "the time must not be rounded"
        h = torch.cat([x.flatten(1), t[:, None] / 999], dim=1).to(self.first.weight.dtype)  # (B, 17)
        h = self.first(h) + self.label_emb(y)  # (B, D)
        for block in self.blocks:
            h = block(h)
        return self.last(h).view_as(x).to(x.dtype)


class Schedule(schedules.VPSchedule):
    def levels(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (1 - u).sqrt(), u.sqrt(), 999 * u


class Points(Indexed):
    """50 items; finish() draws from the numbers of the step, as flips and posteriors do."""

    def __init__(self, length: int = 50):
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(length, *IMAGE, generator=g)
        self.y = torch.arange(length) % 3
        self.seen: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.x)

    def raw(self, items: list[tuple[int, int]]) -> dict[str, Tensor]:
        self.seen += items
        index = torch.tensor([i for i, _ in items])
        return {"x": self.x[index], "y": self.y[index]}

    def finish(self, raw: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        return {**raw, "x": raw["x"] + 0.1 * draws.randn(*raw["x"].shape)}


def config(**train: Any) -> Config:
    settings = dict(
        iterations=6, batch_size=8, lr=0.01, warmup_steps=3, betas=(0.9, 0.99), ema_decay=0.9, p_uncond=0.2,
        log_every=1, checkpoint_every=100,
    )  # fmt: skip
    return Config(
        name="tiny",
        device="cpu",
        model=dict(img_size=4, in_chans=1, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=4),
        diffusion=dict(schedule="vp"),
        train={**settings, **train},
        sample=dict(sampler="dpm_fast"),
        data=dict(name="synthetic", num_workers=0),
    )


def prepared() -> multiprocessing.context.BaseContext:
    """The fork server's context, which knows what to import once."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # before the server starts, for all its children
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def launch(function: Callable[..., Any], *args: Any, ranks: int = 1) -> Any:
    """Call `function(*args)` in `ranks` processes that form a process group; what rank 0 returns,
    or an AssertionError.
    """
    context, port = prepared(), free_port()
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_rank, args=(sender, function, args, r, ranks, port)) for r in range(ranks)]
    for process in processes:
        process.start()
    sender.close()
    try:
        result = torch.load(io.BytesIO(receiver.recv_bytes()))  # EOFError: rank 0 died
    except EOFError:
        result = None
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert all(process.exitcode == 0 for process in processes), f"exit codes {[p.exitcode for p in processes]}"
    return result


def free_port() -> int:
    """One that nobody listens on, below those that the system gives to outgoing connections: such a one may go before
    it is used.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def _rank(sender: Any, function: Callable[..., Any], args: tuple, rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for number in interrupt.SIGNALS:  # whoever started the tests, such as nohup or a script's &, may have ignored some
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    torch.set_num_threads(1)
    deepspeed_adapter.KEEP_WHOLE = 0  # or ZeRO-3 would partition nothing of so small a model
    result = function(*args)
    if rank == 0:
        file = io.BytesIO()
        torch.save(result, file)
        sender.send_bytes(file.getvalue())


def trainer(
    run_dir: Path, cfg: Config, preview: Callable[..., None] | None = None, classes: tuple[str, ...] = ()
) -> Trainer:
    dataset = Points()
    dataset.classes = classes
    return Trainer(cfg, TinyModel(), Objective(Schedule()), dataset, run_dir, preview)


def train(run_dir: Path, cfg: Config) -> dict[str, Any]:
    """Train or continue a run in this process; its rows and its final weights and averages by name."""
    run = trainer(run_dir, cfg)
    first_step = run.step
    run.train()
    weights, ema = run.engine.gather(run.engine.partition), run.engine.gather(run.engine.ema.values)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    return {"first_step": first_step, "rows": rows, "losses": losses, "weights": weights, "ema": ema}
