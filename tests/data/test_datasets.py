"""Datasets give what the trainer expects, and refuse what does not fit."""

import gzip
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_fast.build import build_dataset
from uvit_fast.config import load_config
from uvit_fast.data.datasets import center_crop, random_flip, square_crop
from uvit_fast.data.shards import pack
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError

DIGITS, CIFAR, CELEBA, IMAGENET = (f"configs/{n}.yaml" for n in ("digits", "s2_cifar10", "s4_celeba64", "l4_64"))


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def finished(dataset, items):
    return dataset.finish(dataset.__getitems__(items), Draws(torch.Generator().manual_seed(0)))


def test_digits_are_all_of_scikit_learns_in_the_networks_range():
    dataset = build_dataset(load_config(DIGITS))
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


def test_image_folder_takes_class_folders_and_crops_to_size(tmp_path):
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (200, 130), colour).save(tmp_path / name / "a.png")
    Image.new("L", (70, 90), 255).save(tmp_path / "dog" / "grey.png")
    dataset = build_dataset(load_config(IMAGENET, [f"data.path={tmp_path}"]))
    batch = finished(dataset, [(0, 0), (1, 0), (2, 0)])
    assert batch["x"].shape == (3, 3, 64, 64) and batch["y"].tolist() == [0, 1, 1]
    assert batch["x"][:, :, 32, 32].tolist() == [[1, -1, -1], [-1, -1, 1], [1, 1, 1]]


def test_centre_crop_keeps_the_centre_and_the_aspect():
    """A white square in the middle of a wide black image stays square and central."""
    image = Image.new("L", (400, 200))
    image.paste(255, (150, 50, 250, 150))
    crop = np.asarray(center_crop(image, 64)).astype(int)
    assert crop.shape == (64, 64)
    assert crop[32, 32] == 255 and crop[2, 2] == 0
    assert abs((crop > 127).sum() - 32 * 32) <= 64


def test_flips_mirror_half_of_the_images_and_repeat_with_the_seed():
    x = torch.arange(1000.0 * 4).view(1000, 1, 1, 4)
    a, b = (random_flip(x, Draws(torch.Generator().manual_seed(3))) for _ in range(2))
    flipped = (a != x).flatten(1).any(1)
    assert torch.equal(a, b) and 430 < flipped.sum() < 570
    assert torch.equal(a[flipped], x[flipped].flip(-1))


def test_posteriors_become_scaled_samples(tmp_path):
    """z = scale (mean + std eps), drawn afresh each step, with the log variance clamped."""
    posterior = np.zeros((4, 8, 32, 32), np.float16)
    posterior[:, :4] = 2.0
    posterior[:, 4:] = np.log(0.25)
    posterior[3, 4:] = -60_000  # clamped to -30: practically the mean
    pack(tmp_path, {"moments": posterior, "labels": np.array([5, 999, 0, 1])}, shard_items=2)
    dataset = build_dataset(load_config("configs/h2_256.yaml", [f"data.path={tmp_path}"]))
    batch = finished(dataset, [(i, 0) for i in (1, 2, 3)])
    z = batch["x"] / 0.18215
    assert batch["y"].tolist() == [999, 0, 1]
    assert abs(z[:2].mean() - 2) < 0.03 and abs(z[:2].std() - 0.5) < 0.02
    torch.testing.assert_close(z[2], torch.full((4, 32, 32), 2.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "channels"), [("moments", 8), ("latents", 4)])
def test_text_latents_draw_one_caption_an_epoch(tmp_path, kind, channels):
    text = np.arange(5, dtype=np.float16)[:, None, None] + np.zeros((5, 77, 768), np.float16)
    null = np.full((1, 77, 768), -1, np.float16)
    stored = np.zeros((2, channels, 32, 32), np.float16)
    pack(tmp_path, {kind: stored, "text": text, "captions": np.array([0, 3, 5]), "null_text": null})
    dataset = build_dataset(load_config("configs/s2_coco.yaml", [f"data.path={tmp_path}"]))
    drawn = {i: {int(finished(dataset, [(i, epoch)])["context"][0, 0, 0]) for epoch in range(40)} for i in (0, 1)}
    assert drawn == {0: {0, 1, 2}, 1: {3, 4}}
    assert finished(dataset, [(0, 7)])["context"].equal(finished(dataset, [(0, 7)])["context"])
    assert dataset.null_context.shape == (77, 768)


def test_missing_empty_and_unfitting_data_are_named(tmp_path):
    def refused(config, *overrides):
        with pytest.raises(UserError) as error:
            build_dataset(load_config(config, list(overrides)))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder; expected the CIFAR-10" in refused(CIFAR, f"data.path={tmp_path / 'nothing'}")
    assert "the folder is empty; expected images" in refused(CELEBA, f"data.path={tmp_path}")
    (tmp_path / "readme.txt").write_text("")
    assert "no images; expected files ending in .jpg, .png" in refused(CELEBA, f"data.path={tmp_path}")
    assert "no data_batch_1" in refused(CIFAR, f"data.path={tmp_path}")
    assert "not set" in refused(CIFAR, "data.path=null")
    assert "expect items of (1, 16, 16), got (1, 8, 8)" in refused(DIGITS, "model.img_size=16")
    for classes in (2, 10):  # of which one is the null label
        message = refused(DIGITS, f"model.num_classes={classes}")
        assert "10 classes (0, 1, 2, " in message and " and the null label of train.p_uncond need more than" in message
        assert message.endswith(f"model.num_classes={classes}: set model.num_classes=11")
    message = refused(DIGITS, "model.num_classes=9", "train.p_uncond=0", "sample.guidance_scale=0")
    assert message.endswith("8, 9) need more than model.num_classes=9: set model.num_classes=10")
    with pytest.warns(UserWarning, match="10 classes for the 12 of model.num_classes; labels from 10 on learn nothing"):
        build_dataset(load_config(DIGITS, ["model.num_classes=13"]))
    assert "no manifest.json" in refused("configs/h2_256.yaml", f"data.path={tmp_path}")
    pack(tmp_path, {"moments": np.zeros((2, 8, 32, 32), np.float16)})
    assert "expected labels, for model.num_classes=1001, got none" in refused(
        "configs/h2_256.yaml", f"data.path={tmp_path}"
    )


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    dataset = build_dataset(load_config(CELEBA, [f"data.path={tmp_path}"]))
    with pytest.raises(UserError, match="broken.jpg: not a readable image"):
        dataset.__getitems__([(0, 0)])


@pytest.mark.filterwarnings("ignore:.*not a readable image")
def test_unreadable_images_are_replaced_evenly_and_named_where_the_config_says_skip(tmp_path):
    for i in range(60):
        (tmp_path / f"a{i:02}.jpg").write_bytes(b"")
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"b{i:02}.png")
    dataset = build_dataset(load_config("configs/custom.yaml", [f"data.path={tmp_path}", "data.decoder=pillow"]))
    items = [(i, 0) for i in range(100)]
    with pytest.warns(UserWarning, match="a07.jpg: not a readable image \\(zero bytes\\); another one takes its place"):
        raw = dataset.__getitems__(items)
    shown = raw["x"][:, 0, 0, 0].bincount(minlength=40)
    assert shown.min() >= 1 and shown.max() <= 7  # of 2.5 on average
    assert torch.equal(dataset.__getitems__(items)["x"], raw["x"])
    assert not torch.equal(dataset.__getitems__([(i, 1) for i in range(100)])["x"], raw["x"])  # others in another epoch
    for file in tmp_path.glob("b*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="not one readable image among 100"):
        dataset.__getitems__([(3, 0)])


@pytest.mark.parametrize("size", [(64, 64), (177, 218), (218, 178), (1024, 1024)])
def test_celebas_crop_refuses_what_it_would_fill_with_black(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    dataset = build_dataset(load_config(CELEBA, [f"data.path={tmp_path}"]))
    with pytest.raises(
        UserError, match=f"a.png: data.crop=celeba expects .* got {size[0]} x {size[1]}; data.crop=center"
    ):
        dataset.__getitems__([(0, 0)])


@pytest.mark.parametrize("name", ["digits", "h2_256", "s2_coco"])
def test_an_index_and_torchs_own_loader_get_what_the_network_takes(name, tmp_path):
    dataset = build_dataset(load_config(f"configs/{name}.yaml", [] if name == "digits" else ["data.name=synthetic"]))
    item, last = dataset[3], dataset[-1]
    assert item["x"].shape == dataset.shape and torch.equal(last["x"], dataset[len(dataset) - 1]["x"])
    batch = next(iter(torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, range(8)), batch_size=4)))
    assert batch.keys() == item.keys() and all(batch[key].shape == (4, *item[key].shape) for key in item)
    expected = dataset.finish(dataset.__getitems__([(i, 0) for i in range(4)]), Draws(torch.default_generator))
    assert all(torch.equal(batch[key], expected[key]) for key in item)
    for odd in (slice(0, 2), "0", None):
        with pytest.raises(TypeError, match="expected an index, got"):
            dataset[odd]
    with pytest.raises(IndexError, match=f"expected an index below {len(dataset)}"):
        dataset[len(dataset)]


def test_image_folders_and_latents_are_indexed_too(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (80, 70), "red").save(tmp_path / name / "a.png")
    sets = [f"data.path={tmp_path}", "model.num_classes=3", "train.p_uncond=0.1"]
    for decoder in ("pillow", "auto"):
        dataset = build_dataset(load_config("configs/custom.yaml", [*sets, f"data.decoder={decoder}"]))
        (batch,) = torch.utils.data.DataLoader(dataset, batch_size=2)
        assert batch["x"].shape == (2, 3, 64, 64) and batch["y"].tolist() == [0, 1] and dataset[1]["y"] == 1
        assert dataset[0]["x"][:, 9, 9].tolist() == [1, -1, -1]
    pack(tmp_path / "latents", {"moments": np.zeros((2, 8, 32, 32), np.float16), "labels": np.array([5, 7])})
    latents = build_dataset(load_config("configs/h2_256.yaml", [f"data.path={tmp_path / 'latents'}"]))
    assert latents[1]["x"].shape == (4, 32, 32) and latents[1]["y"] == 7


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


def test_square_crop_is_the_centre():
    image = Image.new("L", (300, 100))
    image.paste(255, (100, 0, 200, 100))
    assert np.asarray(square_crop(image, 50)).min() >= 250
