"""DALI's pixels beside Pillow's, on photographs; and that all else (items, labels, order, refusals) is the same.

The order is the loader's for both decoders. `tests/training/test_loader.py` holds it without DALI.
"""

import shutil
import sys

import pytest
import torch
from PIL import Image

from tests.data.photographs import JPEG, PNG
from uvit_fast.build import build_dataset
from uvit_fast.config import load_config
from uvit_fast.data import dali
from uvit_fast.data.image_folder import ImageFolder
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError
from uvit_fast.training.loader import Order, batches

pytest.importorskip("nvidia.dali", reason="a Linux package; the test extra installs it")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine photographs, and one with odd sides at every halving."""
    folder = tmp_path_factory.mktemp("photos")
    for file in JPEG + PNG:
        shutil.copy(file, folder)
    Image.open(JPEG[0]).crop((0, 0, 639, 415)).save(folder / "odd.jpg", quality=95)
    return folder


def both(folder, size, crop, **options):
    return (kind(str(folder), size, crop, False, False, **options) for kind in (ImageFolder, dali.DaliImages))


@pytest.mark.parametrize(
    "crop, size",
    [
        ("center", 256),  # at most one halving
        ("center", 64),  # two to four
        ("center", 500),  # enlarges some
        ("celeba", 64),
        ("square", 256),  # COCO
    ],
)
def test_dali_gives_pillows_pixels(photos, crop, size, tmp_path):
    if crop == "celeba":
        for file in photos.iterdir():
            Image.open(file).convert("RGB").crop((0, 0, 178, 218)).save(tmp_path / f"{file.name}.png")
        photos = tmp_path
    pillow, ours = both(photos, size, crop)
    items = [(i, 0) for i in range(len(pillow))]
    expected, got = (dataset.__getitems__(items)["x"] for dataset in (pillow, ours))
    assert got.dtype == torch.uint8 and got.shape == (10, 3, size, size) and ours._pipelines
    difference = (got.int() - expected.int()).abs().float().mean(dim=(1, 2, 3))  # of each photograph
    assert difference.max() <= 1  # of 255; 2 were allowed


def test_halving_is_pillows_box_filter_to_the_bit(tmp_path):
    """512 pixels to 64 by halving alone, with nothing left for the bicubic filter."""
    for file in PNG:
        with Image.open(file) as image:
            image.convert("RGB").resize((512, 512)).save(tmp_path / file.name)
    expected, got = (dataset.__getitems__([(i, 0) for i in range(4)])["x"] for dataset in both(tmp_path, 64, "center"))
    assert torch.equal(expected, got)


@pytest.mark.filterwarnings("ignore:.*not a readable image")
def test_what_is_unusual_or_damaged_means_the_same_with_both(photos, tmp_path):
    photo = Image.open(photos / "china.jpg").resize((200, 150))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "fine.png")
    photo.save(tmp_path / "turned.jpg", exif=exif)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("P").save(tmp_path / "palette.png")
    photo.convert("I;16").save(tmp_path / "deep.png")
    alpha = photo.convert("L").resize((64, 64))
    photo.resize((64, 64)).convert("RGBA").save(tmp_path / "other.webp")
    Image.merge("LA", (alpha, alpha)).save(tmp_path / "alpha.png")
    frames = [Image.new("RGB", (200, 150), colour) for colour in ("red", "blue")]
    photo.save(tmp_path / "default_image.png", save_all=True, default_image=True, append_images=frames)
    pillow, ours = both(tmp_path, 64, "center", background=(10, 20, 30))
    expected, got = (dataset.__getitems__([(i, 0) for i in range(8)])["x"] for dataset in (pillow, ours))
    assert (expected.int() - got.int()).abs().float().mean(dim=(1, 2, 3)).max() <= 1

    whole = (photos / "china.jpg").read_bytes()
    half = whole[: len(whole) // 2]
    (tmp_path / "a_closed.jpg").write_bytes(half + b"\xff\xd9")
    (tmp_path / "a_half.jpg").write_bytes(half)
    (tmp_path / "a_zeros.jpg").write_bytes(half.ljust(len(whole), b"\0"))
    (tmp_path / "b_empty.jpg").write_bytes(b"")
    for dataset in both(tmp_path, 64, "center"):
        for index, reason in enumerate(["closed.jpg.*truncated", "half.jpg.*truncated", "zeros.jpg.*truncated"]):
            with pytest.raises(UserError, match=f"a_{reason}"):
                dataset.__getitems__([(index, 0)])
    pillow, ours = both(tmp_path, 64, "center", skip_unreadable=True)
    with pytest.warns(UserWarning, match="b_empty.jpg: not a readable image .zero bytes."):
        expected, got = (dataset.__getitems__([(i, 0) for i in range(12)])["x"] for dataset in (pillow, ours))
    assert (expected.int() - got.int()).abs().float().mean(dim=(1, 2, 3)).max() <= 1
    for dataset in both(photos, 64, "celeba"):
        with pytest.raises(UserError, match="data.crop=celeba expects CelebA's aligned images of 178 x 218 pixels"):
            dataset.__getitems__([(0, 0)])


@pytest.mark.parametrize("width, height", [(1, 1), (3, 2), (1, 300), (700, 2), (31, 32)])
def test_tiny_and_narrow_images_are_cropped_alike(width, height, tmp_path):
    Image.radial_gradient("L").resize((width, height)).convert("RGB").save(tmp_path / "a.png")
    for crop in ("center", "square"):
        expected, got = (dataset.__getitems__([(0, 0)])["x"].int() for dataset in both(tmp_path, 32, crop))
        assert (expected - got).abs().float().mean() <= 1


def test_ranks_share_the_epochs_and_a_run_goes_on_in_the_middle_of_one(photos):
    """Loader processes that are forked from one that used DALI itself; batches of 4 straddle the epochs of 10."""
    _, ours = both(photos, 32, "center")
    ours.__getitems__([(0, 0)])

    def stream(rank, ranks, position, steps, workers):
        order = Order(len(ours), 5, 4 // ranks, 1, rank, ranks, position, steps)
        return torch.cat([raw["x"] for raw in batches(ours, order, workers, CPU)])

    whole = stream(0, 1, 0, 5, 0)  # two epochs
    assert torch.equal(stream(0, 1, 8, 3, 2), whole[8:])
    shares = torch.stack([stream(rank, 2, 0, 5, 1).view(5, 2, 3, 32, 32) for rank in (0, 1)], dim=1)
    assert torch.equal(shares.flatten(0, 2), whole)
    epochs = whole.view(2, 10, -1)
    assert not torch.equal(*epochs) and sorted(epochs[0].sum(1).tolist()) == sorted(epochs[1].sum(1).tolist())


@pytest.mark.parametrize("name, labels", [("l4_64", [0, 1]), ("s4_celeba64", None)])
def test_imagenet_64_and_celeba_train_on_it(name, labels, photos, tmp_path, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    for folder, photo in (("n01", "china.jpg"), ("n02", "rocket.jpg")):
        (tmp_path / folder).mkdir()
        Image.open(photos / photo).crop((0, 0, 178, 218)).save(tmp_path / folder / photo)

    def batch(decoder):
        sets = [f"data.path={tmp_path}", f"data.decoder={decoder}", "data.flip=true"]
        dataset = build_dataset(load_config(f"configs/{name}.yaml", sets))
        return dataset.finish(dataset.__getitems__([(0, 0), (1, 0)]), Draws(torch.Generator().manual_seed(1)))

    expected, got = batch("pillow"), batch("dali")
    assert got["x"].shape == (2, 3, 64, 64) and got["x"].dtype == torch.float32
    assert (got["x"] - expected["x"]).abs().mean() <= 2 / 255  # one of 255 steps over [-1, 1], and the same flips
    assert (got["y"].tolist() if "y" in got else None) == labels


def test_the_config_chooses_and_says_why(photos, monkeypatch, pytestconfig):
    """auto is the faster one: DALI where Pillow would leave cores idle."""
    monkeypatch.chdir(pytestconfig.rootpath)

    def chosen(decoder, workers=2):
        sets = [f"data.path={photos}", f"data.decoder={decoder}", f"data.num_workers={workers}"]
        return build_dataset(load_config("configs/custom.yaml", sets))

    monkeypatch.setattr(dali, "_cores", lambda: 8)
    assert chosen("auto").decoder.startswith("DALI 2") and type(chosen("pillow")) is ImageFolder
    assert chosen("auto", 8).decoder.endswith("(data.num_workers=8 keeps every core busy; cores here: 8)")
    assert chosen("dali", 8).decoder.startswith("DALI 2")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    reason = chosen("auto").decoder
    assert "(DALI is not installed (" in reason and reason.endswith('; pip install -e ".[dali]" -c constraints.txt)')
    with pytest.raises(ImportError, match="data.decoder=dali: DALI is not installed"):
        chosen("dali")
