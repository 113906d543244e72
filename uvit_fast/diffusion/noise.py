"""Noise that belongs to a sample: it depends on the seed and the sample's index, not on the batch that it is drawn in.

For samples that are drawn, NumPy's Philox takes the pair as its 128-bit key; torch's CPU generator would keep only 32 bits of a seed.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable

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


class Draws:
    """Random numbers for the samples of a batch that several processes, or several passes of one, share: each draws for the whole batch
    and takes its rows, so that a sample's numbers do not depend on how the batch is shared. On a GPU that costs some microseconds.

    Args:
        generator: seeded alike for every share; whoever shares draws the same shapes in the same order.
        batch: samples in the whole batch; None: those that are asked for.
        first: this share's first sample.
    """

    def __init__(self, generator: torch.Generator, batch: int | None = None, first: int = 0):
        self.generator, self.batch, self.first = generator, batch, first

    def rand(self, *shape: int) -> Tensor:
        """(B, ...) fp32 on the generator's device, uniform in [0, 1)."""
        return self._rows(torch.rand, shape)

    def randn(self, *shape: int) -> Tensor:
        """(B, ...) fp32 on the generator's device, standard normal."""
        return self._rows(torch.randn, shape)

    def _rows(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        own, *rest = shape
        whole = draw(self.batch or own, *rest, device=self.generator.device, generator=self.generator)
        return whole[self.first : self.first + own]


def seed_from(*numbers: int) -> int:
    """Return a 63-bit seed made of several numbers; neighbouring numbers give unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
