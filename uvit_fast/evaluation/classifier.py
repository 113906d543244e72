"""Features for digits and other small labelled pictures, where Inception's mean little: those of a small classifier.

Trained here on the real training set, in seconds. Its figures are called digits-fid and so on: they compare runs on one dataset
under one classifier, and are no FID.
"""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvit_fast.config import UserError
from uvit_fast.evaluation.inception import Features
from uvit_fast.files import write_whole

STEPS, BATCH, LEARNING_RATE = 600, 128, 2e-3
HELD_OUT = 0.1  # share of the images that the reported accuracy is of
ENOUGH = 0.8  # accuracy, below which the features would say nothing


class Classifier(nn.Module):
    """Two convolutions at full, two at half resolution, 64 features, class scores.

    Args:
        size: (H, W) of the images.
    """

    def __init__(self, size: tuple[int, int], num_classes: int, width: int = 32, dim: int = 64):
        super().__init__()
        self.size = size
        self.shallow = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.deep = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()
        )
        h, w = (-(-side // 4) for side in size)
        self.pool = nn.Linear(2 * width * h * w, dim)
        self.head = nn.Linear(dim, num_classes)
        self.register_buffer("unit", torch.ones(()))

    def forward(self, images: Tensor) -> Features:
        """(B, H, W, 1 or 3) uint8, grey or averaged to grey -> pool (B, dim), spatial (B, h * w * 7)."""
        x = images.float().mean(3, keepdim=True).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 1, H, W)
        x = self.shallow(x)  # (B, width, H / 2, W / 2)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, H / 2 * W / 2 * 7)
        return Features(F.relu(self.pool(self.deep(x).flatten(1))) / self.unit, spatial)

    @torch.no_grad()
    def normalise(self, images: Tensor) -> None:
        """Scale the pool features to a mean square of 1 on (N, H, W, C) images, and the head so that its scores stay."""
        squares = [self(rows).pool.square().mean(1) for rows in images.split(1024)]
        unit = torch.cat(squares).mean().sqrt()
        self.unit.mul_(unit)
        self.head.weight.mul_(unit)


class ClassifierFeatures:
    """The features of a trained classifier, for `features.extract`."""

    prefix = "digits-"

    def __init__(self, model: Classifier, device: torch.device):
        self.model, self.device, self.pool_dim = model.to(device).eval(), device, model.pool.out_features
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


def train_classifier(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Classifier, float]:
    """Fit a classifier to real images; the same images always give the same one on the same machine.

    Args:
        images: (N, H, W, 1 or 3) uint8; labels: (N,) from 0.

    Returns:
        the classifier and its accuracy on the tenth of the images that it never saw.

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
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.from_numpy(rng.choice(kept, BATCH)).to(device)
        loss = F.cross_entropy(model.head(model(x[rows]).pool), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)
    model.normalise(x)
    held = torch.from_numpy(held).to(device)
    guesses = torch.cat([model.head(model(x[rows]).pool).argmax(1) for rows in held.split(1024)])
    accuracy = (guesses == y[held]).double().mean().item()
    if accuracy < ENOUGH:
        raise UserError(
            f"digits-fid: the classifier recognises {accuracy:.0%} of held-out images, expected at least {ENOUGH:.0%}: "
            "its features would say nothing about this dataset"
        )
    return model, accuracy


def cached_classifier(
    images: np.ndarray, labels: np.ndarray, identity: str, cache: Path, device: torch.device
) -> Classifier:
    """`train_classifier`, once for each dataset: figures compare only under the very same classifier.

    Args:
        identity: of the dataset. cache: the folder that keeps the classifier.
    """
    file = cache / f"classifier-{identity[:32]}.pt"
    if file.is_file():
        model = Classifier(images.shape[1:3], int(labels.max()) + 1)
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return model.eval().requires_grad_(False)
    model, accuracy = train_classifier(images, labels, device)
    print(f"digits-fid: trained a classifier on {len(images):,} images, held-out accuracy {accuracy:.3f}")
    write_whole(file, partial(torch.save, {name: value.cpu() for name, value in model.state_dict().items()}))
    return model
