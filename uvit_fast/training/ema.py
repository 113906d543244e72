"""Exponential moving average of the weights (paper, Appendix: 0.9999, every step, no warm-up).

It averages the flat fp32 partition that each rank owns: no gather a step, 4 bytes a parameter divided by the ranks, and the
same average under every ZeRO stage. Under ZeRO 1 and 2 it is part of the optimizer's pass (`GuardedAdamW.update`).
"""

import torch
from torch import Tensor


class EMA:
    """values <- decay * values + (1 - decay) * weights.

    Args:
        weights: (n,) fp32, whose copy is the first value.
        decay: a step, in [0, 1).
    """

    def __init__(self, weights: Tensor, decay: float):
        self.values = weights.detach().clone()  # (n,)
        self.decay = decay

    @torch.no_grad()
    def update(self, weights: Tensor, refused: Tensor) -> None:
        """One step. `refused` is a 0-d fp32 tensor on the weights' device: where it is 1, nothing changes."""
        self.values.lerp_(weights.detach(), (1 - self.decay) * (1 - refused))
