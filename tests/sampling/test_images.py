"""Grids: text of every script stands beside its picture, whichever fonts are here."""

import numpy as np
import pytest
from PIL import Image

from uvit_fast.sampling import images
from uvit_fast.sampling.images import LINE, save_grid, text_picture


@pytest.fixture(params=["with the system's fonts", "without"])
def fonts(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(images, "FONTS", [])
    caches = (images._fonts, images._fonts_with, images.text_picture)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_no_letter_is_lost(fonts):
    """Texts that differ look different, also where no font has their letters."""
    texts = ["u", "ü", "?", "火", "车", "Ж", "नमस्ते", "नमस्ता", "\udce9", "\n"]
    drawn = [np.asarray(text_picture(text)).tobytes() for text in texts]
    assert len(set(drawn)) == len(texts)
    assert text_picture("u\u0308") == text_picture("ü")


def test_long_texts_are_cut_to_their_picture(tmp_path):
    assert text_picture("a green train is coming", 64).width <= 64
    assert text_picture("火" * 200, 5).size == (5, LINE)
    grid = tmp_path / "grid.png"
    save_grid(np.zeros((2, 64, 64, 3), np.uint8), grid, columns=2, captions=["a green train " * 9, ""])
    sheet = np.asarray(Image.open(grid))
    assert (sheet[-LINE - 4 : -4, 4:68] < 128).any() and (sheet[-LINE - 4 : -4, 68:] == 255).all()


def test_rows_have_room_for_their_labels(tmp_path):
    save_grid(np.zeros((2, 8, 8, 1), np.uint8), tmp_path / "grid.png", columns=1, row_labels=["0", "Ankle boot"])
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    label = text_picture("Ankle boot")
    assert sheet.shape[1] == 4 + label.width + 4 + 48 + 4 and (sheet[56:104, 4 : 4 + label.width] < 128).any()
