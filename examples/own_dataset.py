"""A dataset of your own, and a run that learns it: `python examples/own_dataset.py`, minutes on a CPU.

Rings of ten sizes, drawn by the dataset itself: label k is the size. The samples of runs/rings/samples show them.
"""

from pathlib import Path

import torch
from torch import Tensor

from uvit_fast import build_model, build_objective, load_config
from uvit_fast.data.datasets import Batch, Indexed, check_fits
from uvit_fast.diffusion.noise import Draws
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.sampling.previews import training_preview
from uvit_fast.training.trainer import Trainer


class Rings(Indexed):
    """2,000 grey pictures of a ring; item i has label i % 10."""

    num_classes = 10
    classes = tuple(f"radius {2 + 0.5 * k:g}" for k in range(10))  # the labels' names, for grids and --classes

    def __init__(self, size: int = 16):
        self.shape = (1, size, size)

    def __len__(self) -> int:
        return 2000

    def raw(self, items: list[tuple[int, int]]) -> Batch:
        """Return CPU tensors, in loader processes: the same (index, epoch) always gives the same values."""
        y = torch.tensor([index % 10 for index, _ in items])  # (B,)
        return {"x": torch.stack([self.ring(2 + 0.5 * int(label)) for label in y]), "y": y}

    def finish(self, raw: Batch, draws: Draws) -> Batch:
        """Return x as fp32 in [-1, 1], on the training's device. Random numbers come from `draws`, a row per picture,
        so that a run that continues, or uses more GPUs, draws the same.
        """
        brightness = 0.6 + 0.4 * draws.rand(len(raw["x"]), 1, 1, 1)
        return {**raw, "x": raw["x"].float() / 255 * brightness * 2 - 1}  # (B, 1, H, W)

    def ring(self, radius: float) -> Tensor:
        """Draw a ring, (1, H, W) uint8."""
        axis = torch.arange(self.shape[1]) - (self.shape[1] - 1) / 2
        distance = (torch.hypot(axis[:, None], axis[None]) - radius).abs()
        return (255 * (1.5 - distance).clamp(0, 1)).to(torch.uint8)[None]


def train(run: Path, *overrides: str) -> dict[str, float]:
    """Train the config `digits` on another dataset: only the commands need a dataset's name in a config."""
    cfg = load_config("digits", ["name=rings", "model.img_size=16", "train.sample_every=500", *overrides])
    dataset = Rings(cfg.model.img_size)
    check_fits(dataset, cfg)
    preview = training_preview(cfg, Provenance.of(dataset))
    return Trainer(cfg, build_model(cfg), build_objective(cfg), dataset, run, preview).train()


if __name__ == "__main__":
    with in_one_line():
        print(train(Path("runs/rings")))
