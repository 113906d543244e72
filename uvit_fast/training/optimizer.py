"""AdamW on this rank's flat partition of the weights; it refuses non-finite gradients without a sync with the host."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from uvit_fast.config import TrainConfig
from uvit_fast.kernels.ops import adamw
from uvit_fast.training.ema import EMA


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose gradient norm, clipping and refusal of non-finite gradients stay on the device.

    After a step, `grad_norm` is the norm over all ranks before clipping, and `refused` is 1. if that was not finite, so
    that nothing changed, else 0.; both are 0-d fp32 tensors where the partition is: on `device`, or on the host with an
    offloaded optimizer.
    """

    def __init__(self, parameters: list[nn.Parameter], train: TrainConfig, device: torch.device):
        super().__init__(parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True)
        self.clip, self.device = train.grad_clip, device
        self.grad_norm = torch.zeros((), device="cpu" if train.offload_optimizer else device)
        self.refused = torch.zeros_like(self.grad_norm)
        self.found_inf: Tensor | None = None  # switches of the fused kernels, meant for loss scaling
        self.grad_scale: Tensor | None = None
        self.double_betas = torch.tensor(train.betas, dtype=torch.float64, device=device)

    def step(self, closure: Any = None) -> Any:
        """Take PyTorch's own step, on the parameters' gradients."""
        self._look_at([p.grad for group in self.param_groups for p in group["params"]])
        self.found_inf = self.refused
        if self.clip > 0:
            self.grad_scale = self._excess()
        super().step()

    def update(self, weights: Tensor, gradient: Tensor, computed: Tensor, ema: EMA) -> None:
        """Take the same step and the EMA's in one pass.

        Args:
            weights: (n,) fp32, the partition, whose optimizer state exists.
            gradient: (n,), as the network computed it.
            computed: (n,), receives the new weights in the network's dtype.
        """
        self._look_at([gradient])
        keep, (group,), state = 1 - self.refused, self.param_groups, self.state[weights]
        state["step"] += keep
        scale = self._excess().reciprocal() if self.clip > 0 else torch.ones_like(keep)
        numbers = adamw.factors(keep, scale, state["step"], self.double_betas)
        settings = adamw.Settings(group["lr"], group["betas"], group["eps"], group["weight_decay"], ema.decay)
        moments = (state["exp_avg"], state["exp_avg_sq"])
        adamw.adamw(adamw.Partition(weights.detach(), *moments, ema.values, computed, gradient), numbers, settings)

    def _look_at(self, gradients: list[Tensor]) -> None:
        square = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).square().sum()
        if dist.get_world_size() > 1:
            square = square.to(self.device)  # NCCL accepts no host tensors
            dist.all_reduce(square)
        self.grad_norm = square.sqrt().to(self.grad_norm.device)
        self.refused = (~self.grad_norm.isfinite()).float()

    def _excess(self) -> Tensor:
        """Return by which factor the gradient is too long, at least 1."""
        return (self.grad_norm / self.clip).clamp(min=1)
