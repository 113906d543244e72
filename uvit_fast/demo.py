"""The end of `make demo`: a hundred digits from the trained run, and two figures that tell whether they are good."""

import json
import time
from pathlib import Path

import torch

from uvit_fast.build import build_dataset
from uvit_fast.config import load_config
from uvit_fast.data.in_memory import TensorImages
from uvit_fast.evaluation.digits import class_accuracy, nearest_train_ratio
from uvit_fast.runtime.device import pick_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.conditions import spread_labels
from uvit_fast.sampling.images import save_grid, to_uint8
from uvit_fast.sampling.loop import sample
from uvit_fast.sampling.weights import load_for_sampling

ACCURACY = 0.95  # required share of samples recognised as the requested class
RATIO = 0.5  # required, relative to the distance between neighbouring real digits of a class; copies are below it


def run(folder: Path, seed: int = 0) -> int:
    """Sample ten digits of each class from a finished run; write samples.png and metrics.json into its folder.

    Returns:
        0 if both figures are reached, else 1.

    Raises:
        UserError: no run there, or one of another dataset.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: no run; expected the folder that `python train.py --config configs/digits.yaml` writes"
        )
    cfg = load_config(folder / "config.yaml")
    if cfg.data.name != "digits":
        raise UserError(f"{folder}: expected a run with data.name digits, got {cfg.data.name}")
    device = pick_device(cfg.device)
    model = load_for_sampling(cfg, folder, device)
    labels = spread_labels(100, list(range(10)))
    start = time.perf_counter()
    samples = to_uint8(torch.cat(list(sample(model, cfg, 100, labels=labels, seed=seed, batch=100))))
    seconds = time.perf_counter() - start
    save_grid(samples, folder / "samples.png", columns=10, row_labels=[str(digit) for digit in range(10)])

    dataset = build_dataset(cfg)
    assert isinstance(dataset, TensorImages) and dataset.labels is not None
    real = to_uint8(dataset.images * (2 / dataset.peak) - 1).astype(float)  # in the samples' range
    real_labels = dataset.labels.numpy()
    metrics = {
        "class_accuracy": class_accuracy(samples.astype(float), labels.numpy(), real, real_labels),
        "nearest_train_ratio": nearest_train_ratio(samples.astype(float), real, real_labels),
        **_training_speed(folder / "metrics.jsonl", cfg.train.batch_size),
        "sample_seconds": seconds,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    good = metrics["class_accuracy"] >= ACCURACY and metrics["nearest_train_ratio"] >= RATIO
    print(
        f"class_accuracy       {metrics['class_accuracy']:.3f}  "
        f"(at least {ACCURACY}: recognised as the requested digit)"
    )
    print(
        f"nearest_train_ratio  {metrics['nearest_train_ratio']:.3f}  (at least {RATIO}: no copies of training digits)"
    )
    print(f"trained in {metrics['train_seconds']:.0f} s at {metrics['images_per_second']:.0f} images/s on {device}")
    print(f"wrote {folder / 'samples.png'} and {folder / 'metrics.json'}")
    if not good:
        print("the samples do not reach the figures above")
    return 0 if good else 1


def _training_speed(log: Path, batch_size: int) -> dict[str, float]:
    """Return seconds and images per second of the whole training, interruptions included, from the run's log."""
    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}  # continued runs repeat steps
    steps = sorted(rows)
    intervals = zip([0, *steps[:-1]], steps)
    seconds = sum((end - start) * batch_size / rows[end]["images_per_second"] for start, end in intervals)
    return {"train_seconds": seconds, "images_per_second": steps[-1] * batch_size / seconds}
