"""Exponential moving average of the weights (paper, Appendix: 0.9999, every step, no warm-up).

It averages the flat fp32 partition that each rank owns: no gather per step, 4 bytes per parameter divided by the number
of ranks, and the same average under every ZeRO stage. Under ZeRO 1 and 2 it is part of the optimizer's pass
(`GuardedAdamW.update`).
"""

import torch
from torch import Tensor


class EMA:
    """Update values <- decay * values + (1 - decay) * weights.

    Args:
        weights: (n,) fp32; their copy is the initial value.
        decay: per step, in [0, 1).
    """

    def __init__(self, weights: Tensor, decay: float):
        self.values = weights.detach().clone()  # (n,)
        self.decay = decay

    @torch.no_grad()
    def update(self, weights: Tensor, refused: Tensor) -> None:
        """Take one step. `refused`: 0-d fp32 on the weights' device; where it is 1, nothing changes."""
        self.values.lerp_(weights.detach(), (1 - self.decay) * (1 - refused))
