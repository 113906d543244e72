"""Every kind of file that people have: made upright 8-bit RGB, or named with the reason."""

import os

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from uvit_fast.config import UserError
from uvit_fast.data.reading import BadImage, list_images, read_image


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_images().images[0]).resize((96, 64))


def difference(image, expected):
    return np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).mean()


def test_a_photograph_is_read_as_it_is(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    image, oddities = read_image(tmp_path / "a.png")
    assert oddities == [] and difference(image, photo) == 0


def test_greyscale_becomes_rgb(photo, tmp_path):
    photo.convert("L").save(tmp_path / "a.jpg", quality=95)
    image, oddities = read_image(tmp_path / "a.jpg")
    assert oddities == ["greyscale"] and image.mode == "RGB"
    assert difference(image, photo.convert("L").convert("RGB")) < 3


def test_cmyk_becomes_rgb(photo, tmp_path):
    photo.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    image, oddities = read_image(tmp_path / "a.jpg")
    assert oddities == ["CMYK"] and difference(image, photo) < 6


def test_16_bits_are_scaled_and_not_clipped(photo, tmp_path):
    grey = photo.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "a.png")
    image, oddities = read_image(tmp_path / "a.png")
    assert oddities == ["16-bit", "greyscale"] and difference(image, grey.convert("RGB")) == 0


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotated_becomes_upright(photo, tmp_path, orientation):
    """Stored as a camera does: turned or mirrored, with the tag that says how to undo it."""
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's numbers of the inverse transposes
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.transpose(Image.Transpose(turn)).save(tmp_path / "a.png", exif=exif)
    image, oddities = read_image(tmp_path / "a.png")
    assert oddities == ["EXIF-rotated"] and image.size == photo.size and difference(image, photo) == 0


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_truncated_and_empty_files_have_a_reason(photo, tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    photo.save(file)
    whole = file.read_bytes()
    for length in (0, 3, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(BadImage, match="zero bytes" if not length else "truncated|unreadable"):
            read_image(file)


def test_other_files_are_listed_as_ignored_and_loose_images_refused(photo, tmp_path):
    (tmp_path / "cat").mkdir()
    photo.save(tmp_path / "cat" / "A.PNG")
    (tmp_path / "notes.txt").write_text("")
    listing = list_images(tmp_path, labelled=True)
    assert (listing.files, listing.labels, listing.classes) == (["cat/A.PNG"], [0], ["cat"])
    assert listing.ignored == ["notes.txt"]
    photo.save(tmp_path / "loose.png")
    with pytest.raises(UserError, match="one folder a class"):
        list_images(tmp_path, labelled=True)


def test_a_folder_that_cannot_be_listed_is_named_and_not_passed_over(photo, tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    photo.save(tmp_path / "cat" / "a.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="cat: cannot be listed .Permission denied."):
        list_images(tmp_path, labelled=True)
