"""Noise that belongs to a sample: it depends on the seed and the sample's index, not on the batch that it is drawn in.

NumPy's Philox takes the pair as its 128-bit key; torch's CPU generator would keep only 32 bits of a seed.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def sample_noise(seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """x_T ~ N(0, I) for the samples `indices`: (len(indices), *shape) fp32, drawn on the CPU, so the same on every device."""
    draws = [np.random.Generator(np.random.Philox(key=[seed, i])).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))


def sample_generators(seed: int, indices: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """A counter-based generator for each sample, for samplers that draw noise on their way.

    Such a generator has no state but its key, so a captured graph can use it: (len(indices),) int64 keys on `device`.
    """
    keys = [np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] for i in indices]
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64)).to(device)
