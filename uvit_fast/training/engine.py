"""A process of a training run and its DeepSpeed engine: device, process group, ZeRO, optimizer.

Whatever the ZeRO stage, a rank owns one flat fp32 partition of the weights (N / ranks values, plus padding); AdamW updates it in place,
and the EMA averages it. Checkpoints work on that partition and never need to know the stage: `gather` and `scatter` turn anything laid
out like it into named tensors and back.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from uvit_fast.config import Config, TrainConfig
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World
from uvit_fast.training.captured import Captured
from uvit_fast.training.ema import EMA
from uvit_fast.training.optimizer import GuardedAdamW

PARTS = 4  # graphs of the backward with several GPUs: while one runs, the gradients of those before it are reduced
KEEP_WHOLE = 100_000  # ZeRO-3 leaves parameters of fewer values whole on every rank: biases, norms


def batch_plan(train: TrainConfig, ranks: int) -> tuple[int, int]:
    """(images a forward pass on one rank, forward passes a step): batch_size = micro_batch_size x ranks x accumulation.

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
    """Whether the network's weights and activations are bf16 beside fp32 masters, or all fp32."""
    return train.precision == "bf16" or (train.precision == "auto" and device.type == "cuda")


class Engine:
    """DeepSpeed around one model.

    Args:
        model: fp32, on the CPU or the device. Its class may name `block_class`, between whose modules a backward may be cut, and
            `fused_classes`, modules that ZeRO-3 gathers as a whole.
        config: train.zero_stage, precision, batch and optimizer settings.
        world: from `start`.
    """

    def __init__(self, model: nn.Module, config: Config, world: World):
        deepspeed = _import_deepspeed(world)
        train = config.train
        self.world, self.stage = world, train.zero_stage
        self.watched = self.stage == 3 or train.offload_optimizer  # DeepSpeed looks at the gradient's norm itself
        self.overlaps = world.device.type == "cuda" and world.size > 1  # the backward and its reductions
        self.micro_batch, self.accumulation = batch_plan(train, world.size)
        self.bf16 = computes_in_bf16(train, world.device)
        assert not list(model.buffers()), "buffers are neither averaged nor saved"
        if self.stage == 3 and hasattr(model, "fused_classes"):
            deepspeed.utils.set_z3_leaf_modules(model, model.fused_classes)
        model.to(world.device)
        if train.compile:
            model.compile(dynamic=False)
        self.adamw = GuardedAdamW(list(model.parameters()), train, world.device)
        settings = _settings(self, train, sum(p.numel() for p in model.parameters()))
        self.deepspeed, self.zero, _, _ = deepspeed.initialize(model=model, optimizer=self.adamw, config=settings)
        if train.cuda_graphs and world.device.type == "cuda" and self.stage < 3 and not train.compile:
            parts = PARTS if world.size > 1 and hasattr(model, "block_class") else 1
            model.forward = Captured(model, parts, keep_gradients=self.accumulation > 1, agree=self._on_all_ranks)
        flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        assert len(flat) == 1, "one parameter group, one flat partition"
        self.partition: Tensor = flat[0]
        self.ema = EMA(self.partition, train.ema_decay)
        if not self.watched:
            assert self.zero.loss_scale == 1, "the step in one pass unscales nothing"
            self.zero.step = self._update
            if world.size == 1:  # nobody to reduce with: it would copy every gradient to a bucket and back
                self.zero.buffered_reduce_fallback = lambda *_, **__: None
        self._parameters = list(self.deepspeed.module.named_parameters())
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters}  # whole

    def _on_all_ranks(self, fine: bool) -> bool:
        """Whether it is so on all of them. The host waits."""
        verdict = torch.tensor(float(fine), device=self.world.device)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict.item())

    def close(self) -> None:
        """Let go of the model, which hooks of DeepSpeed would keep alive: for processes that go on to something else."""
        self.deepspeed.destroy()

    def __call__(self, *inputs: Tensor, **conditions: Tensor) -> Tensor:
        return self.deepspeed(*inputs, **conditions)

    def backward(self, loss: Tensor) -> None:
        queue_on = self.overlaps and not self.watched and self.deepspeed.is_gradient_accumulation_boundary()
        with _device_waits(self.zero) if queue_on else contextlib.nullcontext():
            self.deepspeed.backward(loss)

    def step(self, lr: float) -> None:
        """End a micro-step; the last one of a step reduces, updates and clears the gradients."""
        for group in self.zero.param_groups:
            group["lr"] = lr
        ends = self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.step()
        if self.watched and ends:
            if self.zero.overflow:  # and did not call AdamW
                self.adamw.grad_norm = torch.full_like(self.adamw.grad_norm, torch.inf)
                self.adamw.refused = torch.ones_like(self.adamw.refused)
            self.ema.update(self.partition, self.adamw.refused)

    @torch.no_grad()
    def _update(self) -> None:
        """DeepSpeed's step under ZeRO 1 and 2, in one pass over the partition where it has one each for the gradient's cast, AdamW,
        the network's weights and the EMA.
        """
        from deepspeed.runtime.utils import all_gather_dp_groups
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        zero, rank = self.zero, self.world.rank
        reduced = torch.cuda.current_stream().record_event() if self.overlaps else None
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero.free_grad_in_param_list(zero.params_not_in_partition[0])
        gradient = zero._get_preflattened_grad_partition(0)
        if gradient is None:
            parts = zero.averaged_gradients[0]
            last = rank == self.world.size - 1
            gradient = (
                zero.flatten_dense_tensors_aligned(parts, zero.partition_size[0]) if last else zero.flatten(parts)
            )
            del parts
        zero.free_grad_in_param_list(zero.params_in_partition[0])
        zero.averaged_gradients[0] = zero.all_grad_tensors[0] = None
        self.moments()
        self.adamw.update(self.partition, gradient, zero.parallel_partitioned_bit16_groups[0][rank], self.ema)
        zero._release_preflattened_grad_buffers(0)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        if reduced:  # no further ahead: until then the reductions' buffers cannot be used again
            reduced.synchronize()

    @property
    def grad_norm(self) -> Tensor:
        """Of the last step, over all ranks before clipping; 0-d fp32 on the device."""
        return self.adamw.grad_norm.to(self.world.device)

    @property
    def refused(self) -> Tensor:
        """1. where the last step changed nothing, its gradient not being finite, else 0.; 0-d fp32 on the device."""
        return self.adamw.refused.to(self.world.device)

    @torch.no_grad()
    def gather(self, flat: Tensor) -> dict[str, Tensor]:
        """Whole fp32 tensors on the CPU of rank 0 by parameter name, from each rank's `flat`, laid out like `partition`.

        All ranks must call it; ranks other than 0 get an empty dict.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        full = {}
        _swap(self.partition, flat)
        for name, parameter in self._parameters:
            value = safe_get_full_fp32_param(parameter)
            if self.world.rank == 0:
                full[name] = value.detach().to("cpu", copy=True)
        _swap(self.partition, flat)
        return full

    @torch.no_grad()
    def scatter(self, full: dict[str, Tensor], flat: Tensor) -> None:
        """The inverse of `gather`: rank 0's whole tensors into each rank's `flat`. All ranks must call it."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

        _swap(self.partition, flat)
        for name, parameter in self._parameters:
            value = torch.empty(self.shapes[name], device=self.world.device)
            if self.world.rank == 0:
                value.copy_(full[name])
            dist.broadcast(value, src=0)
            if self.stage < 3:
                safe_set_full_fp32_param(parameter, value)
            else:  # the last rank's share of a parameter is padded
                share = safe_get_local_fp32_param(parameter).numel()
                padded = nn.functional.pad(value.flatten(), (0, share * self.world.size - value.numel()))
                safe_set_local_fp32_param(parameter, padded.narrow(0, share * self.world.rank, share))
        _swap(self.partition, flat)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that the model computes with those of the fp32 partition, after it was written to."""
        if self.stage < 3:
            self.zero.update_lp_params()
        else:
            self.zero.checkpoint_event_prologue()  # partitions what is gathered
            self.zero._reassign_or_swap_out_partitioned_parameters(0)
            self.zero.checkpoint_event_epilogue()  # gathers what stays gathered

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
        """AdamW's own count of updates, without the refused ones. Reading it waits for the device."""
        self.moments()
        return int(self.adamw.state[self.partition]["step"])

    @adam_step.setter
    def adam_step(self, value: int) -> None:
        self.moments()
        self.adamw.state[self.partition]["step"].fill_(value)


def _import_deepspeed(world: World) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer versions of PyTorch deprecate, at each step.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    if world.device.type == "cpu":
        # Its shared-memory collectives are compiled on first use, for minutes; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # adopts the group that exists
    return deepspeed


@contextlib.contextmanager
def _device_waits(zero: Any) -> Iterator[None]:
    """Where DeepSpeed has the host wait for the reductions at the end of a backward, its device waits instead, with the optimizer's step
    already in its queue.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.synchronize = lambda *_: torch.cuda.current_stream().wait_stream(zero.reduction_stream)
    try:
        yield
    finally:
        del accelerator.synchronize  # the class has its own


def _settings(engine: Engine, train: TrainConfig, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration. What it would wait for the host for, and can be told not to, is off."""
    settings = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": engine.accumulation,
        "zero_allow_untested_optimizer": True,  # GuardedAdamW is AdamW
        "gradient_clipping": 0.0,  # GuardedAdamW clips
        "timers": {"throughput": {"enabled": False}},  # it synchronises every step
        "zero_optimization": {
            "stage": engine.stage,
            "overlap_comm": engine.overlaps,
            "contiguous_gradients": engine.world.size > 1,
            # no bucket is larger than the model: it would only be memory
            "reduce_bucket_size": min(parameters, 50_000_000),  # twice that much memory: one is sent, one filled
            "allgather_bucket_size": min(parameters + parameters % 2, 500_000_000),  # DeepSpeed wants it even
            "sub_group_size": 10**12,  # one flat partition
            "stage3_param_persistence_threshold": KEEP_WHOLE,
            "compute_grad_norm": engine.watched,  # else by AdamW alone, in one pass
        },
    }
    if train.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": engine.world.device.type == "cuda",
        }
        settings["zero_force_ds_cpu_optimizer"] = False  # GuardedAdamW is fused on a CPU too, and needs no compiler
    if engine.bf16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}  # GuardedAdamW refuses them on the device
        if engine.accumulation > 1 and engine.stage > 1:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _swap(a: Tensor, b: Tensor, chunk: int = 1 << 24) -> None:
    """Exchange the values of two flat tensors, in pieces so that no third one is needed."""
    if a is b:
        return
    for x, y in zip(a.detach().split(chunk), b.detach().split(chunk)):
        held = x.clone()
        x.copy_(y)
        y.copy_(held)
