"""Sampling from trained weights: from a name and conditions to PNGs.

In the order of a sample's way: `weights`, `conditions`, `loop` (or `captured`, the loop as one CUDA graph), the decoder
in `data.autoencoders`, `jobs` that may be interrupted, `images`, `output`; `previews` are the trainer's.
"""

from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.sampling.conditions import spread_labels
from uvit_fast.sampling.loop import sample
from uvit_fast.sampling.weights import find_weights, load_for_sampling

__all__ = ["GraphSampler", "find_weights", "load_for_sampling", "sample", "spread_labels"]
