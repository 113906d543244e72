"""DeepSpeed: everything that touches it is here: its settings, what is read from it, and what is replaced in it.

Under ZeRO 1 and 2, with the optimizer on the device, three things are replaced (`DeepSpeed.replace_step`): its
optimizer's step, by one that updates in a single pass; with one rank, the reduction of gradients, which is then
pointless; with several, the host's wait for the reductions. A version that lacks one of them, or what they read, runs
DeepSpeed's own step: the same numbers, after one warning. For everything else used here there is no alternative: a
version without it is refused.

Initialising ZeRO-3 replaces `F.linear` for the whole process, by one that keeps no gathered weight for the backward but
rounds once more before it adds the bias. Here that holds within the engine's forward and backward alone.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from uvit_fast.config import TrainConfig
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World
from uvit_fast.training.optimizer import GuardedAdamW

TESTED = ("0.19.0", "0.19.8")  # the oldest and newest version that the tests ran with; setup.py requires this range
KEEP_WHOLE = 100_000  # ZeRO-3 keeps smaller parameters whole on every rank: biases, norms

PARTITIONS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}
EVER = ("param_groups", "overflow")
NEEDED = {  # stage -> attributes of its optimizer for which there is no alternative
    1: (*EVER, "update_lp_params"),
    2: (*EVER, "update_lp_params"),
    3: (
        *EVER, "checkpoint_event_prologue", "checkpoint_event_epilogue",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
}  # fmt: skip
REPLACED = ("step", "buffered_reduce_fallback")
READ = (  # by the replaced step
    "micro_step_id", "averaged_gradients", "all_grad_tensors", "params_in_partition", "params_not_in_partition",
    "free_grad_in_param_list", "flatten", "flatten_dense_tensors_aligned", "partition_size", "bit16_groups_flat",
    "parallel_partitioned_bit16_groups", "real_dp_process_group", "nccl_start_alignment_factor",
    "allgather_bucket_size", "reduction_stream", "loss_scale",
)  # fmt: skip


class DeepSpeed:
    """DeepSpeed's engine and its ZeRO optimizer around one model.

    Args:
        model: fp32, on the device. Its class may define `fused_classes`, modules that ZeRO-3 gathers as a whole.
        optimizer: of all trainable parameters, in one group; refuses non-finite gradients by itself.
        train: train.zero_stage, offload_optimizer and batch_size.
        world: this process among the ranks.
        micro_batch, accumulation: images per forward pass on one rank, forward passes per step.
        bf16: whether weights, activations and gradients are bf16, beside fp32 masters; otherwise all are fp32.

    Attributes:
        module: the model.
        parameters: its (name, parameter) pairs.
        shapes: name -> shape of the whole parameter, under ZeRO-3 too.
        partition: (n,) fp32, the master weights that this rank owns.
        fused: whether DeepSpeed's step is replaced.

    Raises:
        UserError: this version of DeepSpeed lacks something for which there is no alternative.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: GuardedAdamW,
        train: TrainConfig,
        world: World,
        micro_batch: int,
        accumulation: int,
        bf16: bool,
    ):
        package = _import_deepspeed(world.device)
        self.stage, self.world, self.fused = train.zero_stage, world, False
        self.offloaded = train.offload_optimizer
        self.overlaps = world.device.type == "cuda" and world.size > 1  # the backward and its reductions
        if self.stage == 3 and hasattr(model, "fused_classes"):
            package.utils.set_z3_leaf_modules(model, model.fused_classes)
            if not all(p.requires_grad for p in model.parameters()):
                _reach_inputs(model, tuple(cast(Iterable, model.fused_classes)))
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        settings = self._settings(train, micro_batch, accumulation, bf16, learning)
        linear = F.linear
        self._engine, self._zero, _, _ = package.initialize(model=model, optimizer=optimizer, config=settings)
        self._linear, F.linear = F.linear, linear
        if missing := _missing(self._zero, (PARTITIONS[self.stage], *NEEDED[self.stage])):
            raise UserError(
                f"deepspeed {version('deepspeed')}: expected {', '.join(missing)} in its ZeRO-{self.stage} optimizer; "
                f"versions {TESTED[0]} to {TESTED[1]} have it"
            )
        flat = getattr(self._zero, PARTITIONS[self.stage])
        assert len(flat) == 1, "one parameter group, one flat partition"
        self.partition: Tensor = flat[0]
        self.module: nn.Module = self._engine.module
        self.parameters: list[tuple[str, nn.Parameter]] = list(self.module.named_parameters())
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters}

    def _settings(
        self, train: TrainConfig, micro_batch: int, accumulation: int, bf16: bool, parameters: int
    ) -> dict[str, Any]:
        """Return DeepSpeed's configuration. Every wait of the host that can be turned off is off."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": self.overlaps,
            "contiguous_gradients": self.world.size > 1,
            # no bucket is larger than the model: that would only cost memory
            "reduce_bucket_size": min(parameters, 50_000_000),  # twice that much memory: one is sent, one filled
            "allgather_bucket_size": min(parameters + parameters % 2, 500_000_000),  # DeepSpeed requires an even size
            "sub_group_size": 10**12,  # one flat partition
            "stage3_param_persistence_threshold": KEEP_WHOLE,
        }
        settings = {
            "train_batch_size": train.batch_size,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "zero_allow_untested_optimizer": True,  # GuardedAdamW is AdamW
            "gradient_clipping": 0.0,  # GuardedAdamW clips
            "timers": {"throughput": {"enabled": False}},  # it synchronises at every step
            "zero_optimization": zero,
        }
        if self.offloaded:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
            settings["zero_force_ds_cpu_optimizer"] = False  # GuardedAdamW is fused on CPUs too, without a compiler
        if bf16:
            settings["bf16"] = {
                "enabled": True,
                "check_grad_overflow": False,
            }  # GuardedAdamW refuses them on the device
            if accumulation > 1 and self.stage > 1:
                settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings

    def replace_step(self, update: Callable[[Tensor, Tensor], None]) -> None:
        """Let `update(gradient, computed)` do the steps of ZeRO 1 and 2. Both are (n,) in the network's dtype: this
        rank's share of the averaged gradient, and of the weights that the network computes with, which `update` writes.
        Where DeepSpeed reads the gradient's norm itself, under ZeRO-3 and with an offloaded optimizer, it keeps its own
        step, which calls `optimizer.step`.
        """
        if self.stage == 3 or self.offloaded:
            return
        if missing := self._missing_for_a_step():
            if self.world.rank == 0:
                warnings.warn(
                    f"deepspeed {version('deepspeed')} has no {', '.join(missing)}, as versions {TESTED[0]} to "
                    f"{TESTED[1]} do: its own step runs, which is slower",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        assert self._zero.loss_scale == 1, "the step in one pass unscales nothing"
        self.fused = True
        self._zero.step = lambda: self._step_in_one_pass(update)
        if self.world.size == 1:  # no other rank: it would copy every gradient to a bucket and back
            self._zero.buffered_reduce_fallback = lambda *_, **__: None

    def _missing_for_a_step(self) -> list[str]:
        """Return what `replace_step` replaces or reads and this version of DeepSpeed lacks."""
        from deepspeed.runtime import utils
        from deepspeed.runtime.zero import stage_1_and_2

        missing = _missing(self._zero, (*REPLACED, *READ)) + _missing(accelerator(), ("synchronize",))
        return (
            missing + _missing(utils, ("all_gather_dp_groups",)) + _missing(stage_1_and_2, ("INITIAL_MICRO_STEP_ID",))
        )

    @torch.no_grad()
    def _step_in_one_pass(self, update: Callable[[Tensor, Tensor], None]) -> None:
        """Take DeepSpeed's step under ZeRO 1 and 2 without its extra passes over gradient and weights."""
        from deepspeed.runtime.utils import all_gather_dp_groups
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        zero, rank = self._zero, self.world.rank
        reduced = torch.cuda.current_stream().record_event() if self.overlaps else None
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero.free_grad_in_param_list(zero.params_not_in_partition[0])
        parts = zero.averaged_gradients[0]
        gradient = getattr(parts, "flat_partition", None)  # newer versions may accumulate in one piece
        if gradient is None:
            last = rank == self.world.size - 1
            gradient = (
                zero.flatten_dense_tensors_aligned(parts, zero.partition_size[0]) if last else zero.flatten(parts)
            )
        zero.free_grad_in_param_list(zero.params_in_partition[0])
        zero.averaged_gradients[0] = zero.all_grad_tensors[0] = None
        del parts
        update(gradient.view(-1), zero.parallel_partitioned_bit16_groups[0][rank])
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        if reduced:  # the host runs no further ahead: until then the reductions' buffers cannot be reused
            reduced.synchronize()

    def __call__(self, *inputs: Tensor, **conditions: Tensor) -> Tensor:
        with self._own_linear():
            return self._engine(*inputs, **conditions)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a micro-batch and, in the last one of a step, reduce them."""
        queue_on = self.overlaps and self.fused and self.ends_step
        with self._own_linear(), self._device_waits() if queue_on else contextlib.nullcontext():
            self._engine.backward(loss)

    @contextlib.contextmanager
    def _own_linear(self) -> Iterator[None]:
        """While open, compute linear layers as ZeRO-3 does, if this is ZeRO-3."""
        if self.stage < 3:
            yield
            return
        linear, F.linear = F.linear, self._linear
        try:
            yield
        finally:
            F.linear = linear

    @contextlib.contextmanager
    def _device_waits(self) -> Iterator[None]:
        """At the end of a backward, make the device wait for the reductions where DeepSpeed makes the host wait, so
        that the optimizer's step is already queued.
        """
        device = accelerator()
        device.synchronize = lambda *_: torch.cuda.current_stream().wait_stream(self._zero.reduction_stream)
        try:
            yield
        finally:
            del device.synchronize  # uncovers the class's own

    @property
    def ends_step(self) -> bool:
        """Return whether the current micro-batch is the last one of a step."""
        return self._engine.is_gradient_accumulation_boundary()

    def step(self, lr: float) -> None:
        """End a micro-batch; the last one of a step updates the weights and clears the gradients."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()

    @property
    def skipped(self) -> bool:
        """Return whether DeepSpeed's own step found a non-finite gradient and did not call the optimizer."""
        return self._zero.overflow

    def get_whole(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's whole fp32 master on every rank. All ranks must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def set_whole(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write a whole fp32 master, the same on all ranks; each keeps its share."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage < 3:
            safe_set_full_fp32_param(parameter, value)
            return
        share = safe_get_local_fp32_param(parameter).numel()  # the last rank's is padded
        padded = F.pad(value.flatten(), (0, share * self.world.size - value.numel()))
        safe_set_local_fp32_param(parameter, padded.narrow(0, share * self.world.rank, share))

    def set_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write a whole frozen parameter, which has no master. All ranks must call it, with the same value."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.data.copy_(value)

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the weights that the model computes with from the partition, after it was written."""
        if self.stage < 3:
            self._zero.update_lp_params()
        else:
            self._zero.checkpoint_event_prologue()  # partitions gathered parameters
            self._zero._reassign_or_swap_out_partitioned_parameters(0)
            self._zero.checkpoint_event_epilogue()  # gathers those that stay gathered

    def close(self) -> None:
        """Release the model, which DeepSpeed's hooks would keep alive."""
        self._engine.destroy()


def accelerator() -> Any:
    """Return DeepSpeed's view of the device, whose `synchronize` it calls to make the host wait."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def _reach_inputs(model: nn.Module, leaves: tuple[type, ...]) -> None:
    """Make each leaf's inputs require gradients, even where nothing before the leaf is trainable: ZeRO-3 takes a leaf's
    gradients, and frees its weights, when its inputs have their gradients; without such inputs, before it has begun.
    """

    def reach(module: nn.Module, args: tuple) -> tuple:
        tensors = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]
        if not torch.is_grad_enabled() or any(args[i].requires_grad for i in tensors):
            return args
        first = tensors[0]
        return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])

    for module in model.modules():
        if isinstance(module, leaves) and any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(reach)


def _missing(owner: Any, names: tuple[str, ...]) -> list[str]:
    where = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
    return [f"{where}.{name}" for name in names if not hasattr(owner, name)]


def _import_deepspeed(device: torch.device) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer versions of PyTorch deprecate, in each step.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Its shared-memory collectives are compiled on first use, which takes minutes; gloo does the same job.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # adopts the existing group
    return deepspeed
