"""Noise per sample: it depends on the seed and the sample's index, not on the batch in which it is drawn.

In sampling, the pair is the 128-bit key of NumPy's Philox; torch's CPU generator would keep only 32 bits of a seed.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor


def sample_noise(seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Return x_T ~ N(0, I) of the samples `indices`: (len(indices), *shape) fp32, drawn on the CPU, so identical on
    every device.
    """
    draws = [np.random.Generator(np.random.Philox(key=[seed, i])).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))


def sample_generators(seed: int, indices: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the key of a counter-based generator for each sample, for samplers that draw noise as they go.

    A generator has no state but its key, so a captured graph can use it: (len(indices),) int64 on `device`.
    """
    keys = [np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] for i in indices]
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64)).to(device)


class Draws:
    """Random numbers for the samples of a batch that is split over several processes or micro-batches: each draws for
    the whole batch and takes its own rows, so that a sample's numbers do not depend on the split. On a GPU that costs a
    few microseconds.

    Args:
        generator: seeded alike for every part; all parts draw the same shapes in the same order.
        batch: samples in the whole batch; None: the number requested.
        first: index of this part's first sample.
    """

    def __init__(self, generator: torch.Generator, batch: int | None = None, first: int = 0):
        self.generator, self.batch, self.first = generator, batch, first

    def rand(self, *shape: int) -> Tensor:
        """Return (B, ...) fp32 on the generator's device, uniform in [0, 1)."""
        return self._rows(torch.rand, shape)

    def randn(self, *shape: int) -> Tensor:
        """Return (B, ...) fp32 on the generator's device, standard normal."""
        return self._rows(torch.randn, shape)

    def _rows(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        own, *rest = shape
        whole = draw(self.batch or own, *rest, device=self.generator.device, generator=self.generator)
        return whole[self.first : self.first + own]


def seed_from(*numbers: int) -> int:
    """Return a 63-bit seed made of several numbers; neighbouring numbers give unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
