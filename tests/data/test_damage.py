"""Files that lost a part, and that decoders read as whole pictures all the same."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.photographs import JPEG
from uvit_fast.data import damage
from uvit_fast.data.reading import BadImage, read_image


@pytest.fixture(scope="module")
def photo():
    return Image.open(JPEG[0]).resize((320, 213))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def lost_tails(data):
    """What an interrupted download leaves of a file, or of one whose space was reserved; the last is closed as if it
    ended there.
    """
    for share in (0.3, 0.7, 0.97):
        kept = data[: int(len(data) * share)]
        yield kept
        yield kept.ljust(len(data), b"\0")
        if data[:2] == b"\xff\xd8":
            yield kept + b"\xff\xd9"


KINDS = [
    *[(mode, "JPEG", dict(quality=90)) for mode in ("RGB", "L")],
    *[("RGB", "JPEG", extra) for extra in (dict(progressive=True), dict(restart_marker_rows=2))],
    *[(mode, "WEBP", options) for mode in ("RGB", "RGBA") for options in (dict(quality=80), dict(lossless=True))],
    *[(mode, kind, {}) for mode in ("RGB", "RGBA") for kind in ("PNG", "AVIF")],
    *[("RGB", kind, {}) for kind in ("GIF", "QOI", "JPEG2000")],
    ("RGB", "TIFF", dict(compression="tiff_lzw")),
]


@pytest.mark.parametrize("mode, kind, options", KINDS)
@pytest.mark.filterwarnings("ignore")  # libtiff's
def test_a_lost_tail_is_damage_in_every_compressed_format(photo, tmp_path, mode, kind, options):
    image = photo.convert(mode)
    if mode == "RGBA":
        image.putalpha(photo.convert("L"))
    whole, file = encoded(image, kind, **options), tmp_path / "a"
    file.write_bytes(whole + bytes(1000))  # what comes after the end means nothing
    read_image(file)
    for left in lost_tails(whole):
        file.write_bytes(left)
        with pytest.raises(BadImage, match="truncated|unreadable"):
            read_image(file)


def test_cmyk_is_looked_at_too(photo, tmp_path):
    whole, file = encoded(photo.convert("CMYK"), "JPEG"), tmp_path / "a.jpg"
    file.write_bytes(whole)
    assert read_image(file)[1] == ["CMYK"]
    file.write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    with pytest.raises(BadImage, match="truncated: Corrupt JPEG data: premature end"):
        read_image(file)


@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_are_pillows(photo, tmp_path, progressive):
    for image in (photo, photo.convert("L"), photo.crop((0, 0, 1, 7)), photo.convert("L").crop((0, 0, 9, 1))):
        image.save(tmp_path / "a.jpg", progressive=progressive)
        expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
        assert np.array_equal(read_image(tmp_path / "a.jpg")[0], expected)


def test_other_warnings_of_libjpeg_are_unusual_with_its_words(photo, tmp_path):
    """Bytes that do not belong there, as some cameras leave them, cost nothing; zeros in the middle cost a part."""
    whole, file = encoded(photo, "JPEG", quality=90, restart_marker_rows=1), tmp_path / "a.jpg"
    file.write_bytes(whole[:-2] + b"a camera's" * 9 + whole[-2:])
    image, oddities = read_image(file)
    assert len(oddities) == 1 and "extraneous bytes before marker 0xd9" in oddities[0]
    file.write_bytes(whole)
    assert np.array_equal(image, read_image(file)[0])
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes(3000) + whole[middle + 3000 :])
    assert read_image(file)[1][0].startswith("damaged (Corrupt JPEG data: ")


def test_a_plain_half_is_no_lost_tail(photo, tmp_path):
    """Of which some encoders make nothing but zeros, too."""
    zeros = 0
    for colour in ("white", "black", "teal"):
        tall = Image.new("RGB", (320, 1200), colour)
        tall.paste(photo, (0, 0))
        for kind, options in [
            ("WEBP", dict(quality=100, method=0)),
            ("WEBP", dict(lossless=True, method=0)),
            ("JPEG", {}),
            ("AVIF", {}),
        ]:
            data = encoded(tall, kind, **options)
            (tmp_path / "a").write_bytes(data)
            zeros += not any(data[-damage.ZEROS :])
            assert read_image(tmp_path / "a")[1] == []
    assert zeros == 2


def test_a_png_with_a_wrong_checksum_is_damaged(photo, tmp_path):
    data = bytearray(encoded(photo, "PNG"))
    data[len(data) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadImage, match="truncated or damaged: wrong checksum of IDAT"):
        read_image(tmp_path / "a.png")


def test_without_simplejpeg_jpegs_are_read_and_that_is_said(photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "a.jpg")
    expected, _ = read_image(tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    damage.strict_jpeg.cache_clear()
    try:
        with pytest.warns(UserWarning, match="simplejpeg is not installed"):
            assert np.array_equal(read_image(tmp_path / "a.jpg")[0], expected)
    finally:
        damage.strict_jpeg.cache_clear()
