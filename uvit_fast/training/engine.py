"""Train a model on this rank: its share of the weights, AdamW, the EMA, captured steps.

Whatever the ZeRO stage, a rank owns one flat fp32 partition of the weights (N / ranks values, plus padding); AdamW
updates it in place, and the EMA averages it. Checkpoints work on that partition and need not know the stage: `gather`
and `scatter` convert between anything laid out like it and named tensors.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from uvit_fast.config import Config, TrainConfig
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World
from uvit_fast.training.captured import Captured
from uvit_fast.training.deepspeed_adapter import DeepSpeed
from uvit_fast.training.ema import EMA
from uvit_fast.training.optimizer import GuardedAdamW

PARTS = 4  # graphs of the backward on several GPUs: while one runs, the gradients of the previous ones are reduced


def batch_plan(train: TrainConfig, ranks: int) -> tuple[int, int]:
    """Return (images per forward pass on one rank, forward passes per step), such that batch_size = micro_batch_size x
    ranks x accumulation.

    Raises:
        UserError: no whole numbers satisfy that.
    """
    micro = train.micro_batch_size or train.batch_size // ranks
    if micro == 0 or train.batch_size % (micro * ranks):
        which = "micro_batch_size" if train.micro_batch_size else "micro_batch_size (unset, so batch_size / GPUs)"
        raise UserError(
            f"train: expected batch_size = {which} x GPUs x a whole number of accumulation steps, "
            f"got batch_size {train.batch_size}, micro_batch_size {micro or train.batch_size / ranks:g}, GPUs {ranks}"
        )
    return micro, train.batch_size // (micro * ranks)


def computes_in_bf16(train: TrainConfig, device: torch.device) -> bool:
    """Return whether the network's weights and activations are bf16 beside fp32 masters; otherwise all are fp32."""
    return train.precision == "bf16" or (train.precision == "auto" and device.type == "cuda")


class Engine:
    """The training state of one model: DeepSpeed, AdamW, the EMA, and captured steps.

    Args:
        model: fp32, on the CPU or the device; parameters that require no gradient are frozen. Its class may define
            `block_class`, between whose modules a backward may be cut, and `fused_classes`, modules that ZeRO-3 gathers
            as a whole.
        config: train.zero_stage, precision, batch and optimizer settings.
        world: from `start`.
    """

    def __init__(self, model: nn.Module, config: Config, world: World):
        train = config.train
        self.world, self.stage = world, train.zero_stage
        self.micro_batch, self.accumulation = batch_plan(train, world.size)
        self.bf16 = computes_in_bf16(train, world.device)
        assert not list(model.buffers()), "buffers are neither averaged nor saved"
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        # in fp32, on rank 0's host: the device has them in the dtype of its computation
        self.frozen = {name: p.detach().to("cpu", copy=True) for name, p in frozen.items() if world.rank == 0}
        model.to(world.device)
        if train.compile:
            model.compile(dynamic=False)
        self.adamw = GuardedAdamW([p for p in model.parameters() if p.requires_grad], train, world.device)
        self.deepspeed = DeepSpeed(model, self.adamw, train, world, self.micro_batch, self.accumulation, self.bf16)
        if train.cuda_graphs and world.device.type == "cuda" and self.stage < 3 and not train.compile:
            parts = PARTS if world.size > 1 and hasattr(model, "block_class") else 1
            model.forward = Captured(model, parts, keep_gradients=self.accumulation > 1, agree=self._on_all_ranks)
        self.partition, self.shapes = self.deepspeed.partition, self.deepspeed.shapes
        self.learning = [(name, p) for name, p in self.deepspeed.parameters if name not in frozen]
        self.ema = EMA(self.partition, train.ema_decay)
        self.deepspeed.replace_step(self._update)

    def _on_all_ranks(self, fine: bool) -> bool:
        """Return whether `fine` holds on all ranks. The host waits."""
        verdict = torch.tensor(float(fine), device=self.world.device)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict.item())

    def close(self) -> None:
        """Release the model, for processes that go on to something else."""
        self.deepspeed.close()

    def __call__(self, *inputs: Tensor, **conditions: Tensor) -> Tensor:
        return self.deepspeed(*inputs, **conditions)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def step(self, lr: float) -> None:
        """End a micro-step; the last one of a step reduces, updates and clears the gradients."""
        ends = self.deepspeed.ends_step
        self.deepspeed.step(lr)
        if ends and not self.deepspeed.fused:
            if self.deepspeed.skipped:
                self.adamw.grad_norm = torch.full_like(self.adamw.grad_norm, torch.inf)
                self.adamw.refused = torch.ones_like(self.adamw.refused)
            self.ema.update(self.partition, self.adamw.refused)

    def _update(self, gradient: Tensor, computed: Tensor) -> None:
        """Update the partition by AdamW, the weights that the network computes with, and the EMA, in one pass."""
        self.moments()
        self.adamw.update(self.partition, gradient, computed, self.ema)

    @property
    def grad_norm(self) -> Tensor:
        """The last step's gradient norm over all ranks, before clipping; 0-d fp32 on the device."""
        return self.adamw.grad_norm.to(self.world.device)

    @property
    def refused(self) -> Tensor:
        """1. if the last step changed nothing because its gradient was not finite, else 0.; 0-d fp32 on the device."""
        return self.adamw.refused.to(self.world.device)

    @torch.no_grad()
    def gather(self, flat: Tensor) -> dict[str, Tensor]:
        """Return whole fp32 tensors of the trainable parameters, by name, on rank 0's CPU, from `flat`, which is laid
        out like `partition`.

        All ranks must call it; ranks other than 0 get an empty dict.
        """
        full = {}
        _swap(self.partition, flat)
        for name, parameter in self.learning:
            value = self.deepspeed.get_whole(parameter)
            if self.world.rank == 0:
                full[name] = value.detach().to("cpu", copy=True)
        _swap(self.partition, flat)
        return full

    @torch.no_grad()
    def scatter(self, full: dict[str, Tensor], flat: Tensor) -> None:
        """Invert `gather`: write rank 0's whole tensors to each rank's `flat`. All ranks must call it."""
        _swap(self.partition, flat)
        for name, parameter in self.learning:
            self.deepspeed.set_whole(parameter, self._on_every_rank(name, full))
        _swap(self.partition, flat)

    def _on_every_rank(self, name: str, full: dict[str, Tensor]) -> Tensor:
        value = torch.empty(self.shapes[name], device=self.world.device)
        if self.world.rank == 0:
            value.copy_(full[name])
        dist.broadcast(value, src=0)
        return value

    def weights(self, flat: Tensor) -> dict[str, Tensor]:
        """`gather` the weights (`partition`) or their EMA, together with the frozen weights, which both share."""
        return {**self.frozen, **self.gather(flat)}

    @torch.no_grad()
    def load(self, full: dict[str, Tensor]) -> None:
        """Set the weights, but not the EMA, to rank 0's whole tensors of all parameters. All ranks must call it."""
        learning = dict(self.learning)
        for name, parameter in self.deepspeed.parameters:
            if name not in learning:
                self.deepspeed.set_frozen(parameter, self._on_every_rank(name, full))
        self.frozen = {name: full[name].float() for name in self.frozen}
        self.scatter(full, self.partition)
        self.deepspeed.refresh()

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's first and second moments, flat and laid out like `partition`; made on first use."""
        state = self.adamw.state[self.partition]
        if not state:
            state["step"] = torch.zeros((), device=self.partition.device)
            state["exp_avg"] = torch.zeros_like(self.partition, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(self.partition, requires_grad=False)
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}

    @property
    def adam_step(self) -> int:
        """AdamW's own count of updates, without refused ones. Reading it waits for the device."""
        self.moments()
        return int(self.adamw.state[self.partition]["step"])

    @adam_step.setter
    def adam_step(self, value: int) -> None:
        self.moments()
        self.adamw.state[self.partition]["step"].fill_(value)


def _swap(a: Tensor, b: Tensor, chunk: int = 1 << 24) -> None:
    """Exchange the values of two flat tensors, in pieces so that no third one is needed."""
    if a is b:
        return
    for x, y in zip(a.detach().split(chunk), b.detach().split(chunk)):
        held = x.clone()
        x.copy_(y)
        y.copy_(held)
