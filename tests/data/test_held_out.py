"""Images that are held out are not trained on, in any view of them, and are of the same kind as those that are."""

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_fast.build import build_dataset, hold_out
from uvit_fast.config import load_config
from uvit_fast.data import shards
from uvit_fast.data.datasets import split
from uvit_fast.data.image_folder import ImageFolder
from uvit_fast.data.latents import Latents
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def digits(held_out):
    cfg = load_config("configs/digits.yaml", ["evaluate.every=10", f"evaluate.held_out={held_out}"])
    return cfg, build_dataset(cfg)


def test_every_image_is_in_one_of_the_two(tmp_path):
    """Always the same ones, and fewer are among more; labels keep their meaning."""
    cfg, whole = digits(400)
    rest, held = hold_out(cfg, whole)
    together = torch.cat([rest.images, held.images]).flatten(1)
    assert (len(rest), len(held)) == (1397, 400) and rest.num_classes == 10
    assert torch.equal(together.unique(dim=0), whole.images.flatten(1).unique(dim=0))
    again, fewer = (hold_out(*digits(n))[1].images for n in (400, 100))
    assert torch.equal(again, held.images)
    assert {tuple(x.flatten().tolist()) for x in fewer} <= {tuple(x.flatten().tolist()) for x in held.images}
    item = held.raw([(7, 0)])
    at = (whole.images == item["x"]).flatten(1).all(1)
    assert whole.labels[at].unique().tolist() == item["y"].tolist()


def test_a_mirror_image_goes_where_its_image_goes(tmp_path):
    """Item 2i + 1 mirrors item 2i; where a shard is lost, no item takes another's place across the border."""
    moments = np.arange(40, dtype=np.float32).repeat(8 * 4).reshape(40, 8, 2, 2)
    shards.pack(tmp_path, {"moments": moments, "labels": np.arange(40) // 2}, shard_items=8, scale_factor=1.0)
    for lost in (False, True):
        if lost:
            (tmp_path / "moments-00001.npy").unlink()
        with pytest.warns(UserWarning) if lost else torch.no_grad():
            data = Latents(str(tmp_path), 1.0, skip_damaged=True)
        parts = split(data, 6)
        taken = [{int(part.raw([(i, 0)])["y"]) for i in range(len(part))} for part in parts]
        assert [len(part) for part in parts] == [28, 6] and not taken[0] & taken[1]
    batch = parts[1].finish(parts[1].raw([(i, 0) for i in range(6)]), Draws(torch.Generator().manual_seed(0)))
    assert batch["x"].shape == (6, 4, 2, 2)


def folder(path, classes=("a", "b"), images=6):
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(path / name / f"{i}.png")
    return path


def test_what_takes_the_place_of_a_damaged_image_is_not_a_held_out_one(tmp_path):
    path = folder(tmp_path / "x")
    rest, held = split(ImageFolder(str(path), 8, "center", False, True, skip_unreadable=True), 4)
    assert sorted(rest.files + held.files) == sorted(f"{c}/{i}.png" for c in "ab" for i in range(6))
    for name in rest.files[1:]:
        (path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="another one takes its place"):
        reds = {int(rest.raw([(i, epoch)])["x"].max()) for i in range(len(rest)) for epoch in range(3)}
    assert reds == {10 * int(rest.files[0][2])}


def test_a_path_has_data_of_the_same_kind(tmp_path):
    train, other = folder(tmp_path / "train"), folder(tmp_path / "other", images=2)
    folder(tmp_path / "classes", ("a", "c"))
    settings = [f"data.path={train}", "data.flip=true", "model.num_classes=2", "evaluate.every=1", "data.num_workers=0"]

    def held(path):
        cfg = load_config("configs/custom.yaml", [*settings, f"evaluate.held_out={path}"])
        return hold_out(cfg, build_dataset(cfg))

    rest, found = held(other)
    assert (len(rest), len(found)) == (12, 4) and not found.flip and rest.flip
    for path, words in (
        (train, "expected other images than data.path"),
        (train / "a", "expected other images than data.path"),  # a part of them
        (tmp_path / "nothing", "evaluate.held_out: .*nothing: no such folder"),
        (tmp_path / "classes", "evaluate.held_out .*expected the classes .*label 1 was b, now c"),
        (12, "expected fewer than all 12 images of the data, got 12; --set evaluate.held_out=2 holds out a tenth"),
    ):
        with pytest.raises(UserError, match=words) as error:
            held(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="data digits have no path: expected a number of images"):
        hold_out(*digits(other))
