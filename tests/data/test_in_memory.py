"""Datasets in memory read their files whole, and refuse what is not theirs."""

import gzip
import os
import pickle

import numpy as np
import pytest
import torch

from uvit_fast.build import build_dataset
from uvit_fast.config import load_config
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError

CIFAR = "configs/s2_cifar10.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def finished(dataset, items):
    return dataset.finish(dataset.__getitems__(items), Draws(torch.Generator().manual_seed(0)))


def test_digits_are_all_of_scikit_learns_in_the_networks_range():
    dataset = build_dataset(load_config("configs/digits.yaml"))
    batch = finished(dataset, [(i, 0) for i in range(len(dataset))])
    assert len(dataset) == 1797 and batch["x"].shape == (1797, 1, 8, 8)
    assert batch["x"].min() == -1 and batch["x"].max() == 1
    assert batch["y"].unique().tolist() == list(range(10))


@pytest.mark.parametrize("name", ["h2_256", "s2_coco", "s2_cifar10", "m4_64", "digits"])
def test_synthetic_data_fits_every_kind_of_config(name):
    cfg = load_config(f"configs/{name}.yaml", ["data.name=synthetic"])
    dataset = build_dataset(cfg)
    batch = finished(dataset, [(0, 0), (1_000_000, 3)])
    assert dataset.synthetic and batch["x"].shape == (2, cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)
    assert ("y" in batch, "context" in batch) == (bool(cfg.model.num_classes), bool(cfg.model.context_dim))


def test_cifar10_reads_the_python_batches(tmp_path):
    pixels = np.arange(5 * 2 * 3072).reshape(5, 2, 3072).astype(np.uint8)
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}").write_bytes(pickle.dumps({b"data": pixels[i], b"labels": [0, 1]}))
    dataset = build_dataset(load_config(CIFAR, [f"data.path={tmp_path}", "data.flip=false"]))
    batch = finished(dataset, [(3, 0)])
    expected = torch.from_numpy(pixels[1, 1]).float().view(1, 3, 32, 32) / 127.5 - 1
    torch.testing.assert_close(batch["x"], expected)
    assert "y" not in batch and not dataset.classes  # the paper's CIFAR-10 model is unconditional
    dataset = build_dataset(load_config(CIFAR, [f"data.path={tmp_path}", "model.num_classes=10"]))
    assert finished(dataset, [(3, 0)])["y"].tolist() == [1] and dataset.classes[1] == "automobile"


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["PROOF"],)


@pytest.mark.parametrize(
    "batch", [RunsCode(), {b"data": RunsCode()}, {b"data": np.array([RunsCode()])}, [], {}, {b"data": np.zeros(3)}]
)
def test_a_cifar10_batch_runs_nothing_and_is_refused_where_it_is_none(tmp_path, monkeypatch, batch):
    monkeypatch.setenv("PROOF", str(tmp_path / "ran"))
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match="expected a CIFAR-10 python batch"):
        build_dataset(load_config(CIFAR, [f"data.path={tmp_path}"]))
    assert not (tmp_path / "ran").exists()


def test_fashion_mnist_reads_idx_files_and_names_a_truncated_one(tmp_path):
    pixels, labels = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8), np.array([9, 0, 4], np.uint8)
    images = bytes([0, 0, 8, 3, *b"\0\0\0\3", *b"\0\0\0\x1c", *b"\0\0\0\x1c"]) + pixels.tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3]) + labels.tobytes())
    cfg = load_config("configs/s2_fashion.yaml", [f"data.path={tmp_path}"])
    batch = finished(build_dataset(cfg), [(0, 0), (2, 0)])
    assert batch["y"].tolist() == [9, 4] and batch["x"].shape == (2, 1, 28, 28)
    assert torch.equal(batch["x"][1, 0], torch.from_numpy(pixels[2]).float() * (2 / 255) - 1)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images[:-1]))
    with pytest.raises(UserError, match="truncated: expected 2352 values, got 2351"):
        build_dataset(cfg)
