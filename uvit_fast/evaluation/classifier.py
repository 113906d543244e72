"""Features for digits and other small labelled pictures, for which Inception's mean little: those of a small
classifier.

It is trained here on the real training set, in seconds. Its figures are called digits-fid and so on: they compare runs
on one dataset under one classifier, and are not FID.
"""

import contextlib
import hashlib
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvit_fast.evaluation.inception import Features
from uvit_fast.evaluation.sources import Images
from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole
from uvit_fast.runtime.progress import Bar

STEPS, BATCH, LEARNING_RATE = 600, 128, 2e-3
FULL = 32  # pixels a side; larger images are read at larger strides, and half the steps, which cost more, tell as much
PIXELS = 1 << 20  # per batch, where no gradient is kept
BROKEN = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)  # what a bad file raises
TRAINED_ON, ROOM = 60_000, 4 * 10**9  # at most so many images, and bytes of them
HELD_OUT = 0.1  # share of the images on which the accuracy is measured
ENOUGH = 0.8  # accuracy below which the features would say nothing


class Classifier(nn.Module):
    """Two convolutions at full, two at half resolution, 64 features, class scores.

    "Full" means at most 32 pixels a side: for larger images the first convolution has a larger kernel and stride.

    Args:
        size: (H, W) of the images.
    """

    def __init__(self, size: tuple[int, int], num_classes: int, width: int = 32, dim: int = 64):
        super().__init__()
        self.size = size
        stride = -(-max(size) // FULL)
        self.shallow = nn.Sequential(
            nn.Conv2d(1, width, 2 * stride + 1, stride, stride), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.deep = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()
        )
        h, w = (-(-side // (4 * stride)) for side in size)
        self.pool = nn.Linear(2 * width * h * w, dim)
        self.head = nn.Linear(dim, num_classes)
        self.unit: Tensor
        self.register_buffer("unit", torch.ones(()))

    def forward(self, images: Tensor) -> Features:
        """Map (B, H, W, 1 or 3) uint8, averaged to grey, to pool (B, dim) and spatial (B, h * w * 7) features."""
        x = images.float().mean(3, keepdim=True).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 1, H, W)
        x = self.shallow(x)  # (B, width, h, w): half of H and W, or of what the stride leaves
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, h * w * 7)
        return Features(F.relu(self.pool(self.deep(x).flatten(1))) / self.unit, spatial)

    @torch.no_grad()
    def normalise(self, images: Tensor) -> None:
        """Scale the pool features to mean square 1 on images (N, H, W, C), and the head so that its scores stay the
        same.
        """
        squares = [self(rows).pool.square().mean(1) for rows in _in_parts(images)]
        unit = torch.cat(squares).mean().sqrt()
        self.unit.mul_(unit)
        self.head.weight.mul_(unit)


class ClassifierFeatures:
    """The features of a trained classifier, for `features.extract`."""

    prefix, like = "digits-", "none"

    def __init__(self, model: Classifier, device: torch.device | str):
        self.device, self.pool_dim = as_device(device), model.pool.out_features
        self.model = model.to(self.device).eval()
        digest = hashlib.sha256()
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        self.identity = f"classifier-{digest.hexdigest()[:16]}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        if images.shape[1:3] != self.model.size:
            raise UserError(
                f"digits-fid: the classifier's images are {self.model.size[0]} x {self.model.size[1]}, "
                f"got {images.shape[1]} x {images.shape[2]}"
            )
        return self.model(images)

    @torch.inference_mode()
    def probabilities(self, pool: Tensor) -> Tensor:
        return torch.softmax(self.model.head(pool.to(self.device, torch.float32)), 1)


def train_classifier(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> tuple[Classifier, float]:
    """Fit a classifier to real images; the same images give the same classifier on the same machine.

    Args:
        images: (N, H, W, 1 or 3) uint8; labels: (N,) from 0.

    Returns:
        The classifier and its accuracy on the held-out tenth of the images.

    Raises:
        UserError: fewer than two classes, or classes that cannot be told apart.
    """
    if len(np.unique(labels)) < 2:
        raise UserError(f"digits-fid: expected labels of two classes or more, got {len(np.unique(labels))}")
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    held, kept = np.split(order, [max(1, int(HELD_OUT * len(images)))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(images.shape[1:3], int(labels.max()) + 1).to(device)
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = STEPS if max(images.shape[1:3]) <= FULL else STEPS // 2
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in Bar(range(steps), what=f"digits-fid: a classifier of {len(images):,} images", unit="steps", delay=1):
        rows = torch.from_numpy(rng.choice(kept, BATCH)).to(device)
        loss = F.cross_entropy(model.head(model(x[rows]).pool), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)
    model.normalise(x)
    rows_held = torch.from_numpy(held).to(device)
    guesses = torch.cat([model.head(model(rows).pool).argmax(1) for rows in _in_parts(x[rows_held])])
    accuracy = (guesses == y[rows_held]).double().mean().item()
    if accuracy < ENOUGH:
        raise UserError(
            f"digits-fid: the classifier recognises {accuracy:.0%} of held-out images, expected at least {ENOUGH:.0%}: "
            "its features would say nothing about this dataset"
        )
    return model, accuracy


def _in_parts(images: Tensor) -> tuple[Tensor, ...]:
    """Split (N, H, W, C) into parts that fit in memory beside their features."""
    return images.split(max(1, PIXELS // images[0, :, :, 0].numel()))


def cached_classifier(images: Images, labels: np.ndarray, cache: Path, device: torch.device | str) -> Classifier:
    """Call `train_classifier` once per dataset: figures compare only under the very same classifier.

    Of very many images it takes evenly spaced ones.

    Args:
        labels: (N,), one per image. cache: the folder that keeps the classifier.
    """
    assert images.identity is not None
    key = hashlib.sha256(images.identity().encode() + labels.astype(np.int64).tobytes()).hexdigest()
    file = cache / f"classifier-{key[:32]}.pt"
    (first,) = images.read([range(1)])
    if file.is_file():
        model = Classifier(first.shape[1:3], int(labels.max()) + 1)
        with contextlib.suppress(*BROKEN):  # then it is trained anew
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            return model.eval().requires_grad_(False)
    step = max(1, -(-images.count // TRAINED_ON), -(-images.count * first.nbytes // ROOM))
    wide = 1 if step > 1 else 256
    parts = [range(i, min(i + wide, images.count)) for i in range(0, images.count, step * wide)]
    what = f"digits-fid: reading {images.name}"
    reading = Bar(images.read(parts), what=what, unit="batches", total=len(parts), delay=1)
    pixels = np.concatenate(list(reading))
    model, accuracy = train_classifier(pixels, labels[::step], device)
    print(f"digits-fid: trained a classifier on {len(pixels):,} images, held-out accuracy {accuracy:.3f}")
    try:
        write_whole(file, partial(torch.save, {name: value.cpu() for name, value in model.state_dict().items()}))
    except (OSError, RuntimeError) as error:  # the latter is torch's, for a full disk
        print(
            f"warning: {file}: cannot be kept ({error}); figures of another run are of another classifier",
            file=sys.stderr,
        )
    return model
