"""The crops and the flip do what the paper's code did."""

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_fast.build import build_dataset
from uvit_fast.config import load_config
from uvit_fast.data.transforms import center_crop, random_flip, square_crop
from uvit_fast.diffusion.noise import Draws
from uvit_fast.runtime.errors import UserError

CELEBA = "configs/s4_celeba64.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def test_centre_crop_keeps_the_centre_and_the_aspect():
    """A white square in the middle of a wide black image stays square and central."""
    image = Image.new("L", (400, 200))
    image.paste(255, (150, 50, 250, 150))
    crop = np.asarray(center_crop(image, 64)).astype(int)
    assert crop.shape == (64, 64)
    assert crop[32, 32] == 255 and crop[2, 2] == 0
    assert abs((crop > 127).sum() - 32 * 32) <= 64


def test_square_crop_is_the_centre():
    image = Image.new("L", (300, 100))
    image.paste(255, (100, 0, 200, 100))
    assert np.asarray(square_crop(image, 50)).min() >= 250


def test_flips_mirror_half_of_the_images_and_repeat_with_the_seed():
    x = torch.arange(1000.0 * 4).view(1000, 1, 1, 4)
    a, b = (random_flip(x, Draws(torch.Generator().manual_seed(3))) for _ in range(2))
    flipped = (a != x).flatten(1).any(1)
    assert torch.equal(a, b) and 430 < flipped.sum() < 570
    assert torch.equal(a[flipped], x[flipped].flip(-1))


@pytest.mark.parametrize("size", [(64, 64), (177, 218), (218, 178), (1024, 1024)])
def test_celebas_crop_refuses_what_it_would_fill_with_black(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    dataset = build_dataset(load_config(CELEBA, [f"data.path={tmp_path}"]))
    with pytest.raises(
        UserError, match=f"a.png: data.crop=celeba expects .* got {size[0]} x {size[1]}; data.crop=center"
    ):
        dataset.__getitems__([(0, 0)])
