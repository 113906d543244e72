"""Datasets give what the trainer expects, and refuse what does not fit."""

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_fast.build import build_dataset
from uvit_fast.config import load_config
from uvit_fast.data.shards import pack
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError

DIGITS, CIFAR, CELEBA = (f"configs/{n}.yaml" for n in ("digits", "s2_cifar10", "s4_celeba64"))


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def finished(dataset, items):
    return dataset.finish(dataset.__getitems__(items), Draws(torch.Generator().manual_seed(0)))


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
    assert "readme.txt: a file; expected a folder with images" in refused(CELEBA, f"data.path={tmp_path}/readme.txt")
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
