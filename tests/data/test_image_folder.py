"""Images below a folder: their labels, and what becomes of those that cannot be read."""

import pytest
import torch
from PIL import Image

from uvit_fast.build import build_dataset
from uvit_fast.config import load_config
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError

CELEBA, IMAGENET = "configs/s4_celeba64.yaml", "configs/l4_64.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def finished(dataset, items):
    return dataset.finish(dataset.__getitems__(items), Draws(torch.Generator().manual_seed(0)))


def test_image_folder_takes_class_folders_and_crops_to_size(tmp_path):
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (200, 130), colour).save(tmp_path / name / "a.png")
    Image.new("L", (70, 90), 255).save(tmp_path / "dog" / "grey.png")
    dataset = build_dataset(load_config(IMAGENET, [f"data.path={tmp_path}"]))
    batch = finished(dataset, [(0, 0), (1, 0), (2, 0)])
    assert batch["x"].shape == (3, 3, 64, 64) and batch["y"].tolist() == [0, 1, 1]
    assert batch["x"][:, :, 32, 32].tolist() == [[1, -1, -1], [-1, -1, 1], [1, 1, 1]]


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
