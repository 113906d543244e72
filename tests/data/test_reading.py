"""Every kind of file that people have: made upright 8-bit RGB, or named with the reason."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from uvit_fast.data.reading import BadImage, read_image


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


def cut_out(hidden):
    """A red square; `hidden` (32, 32, 3) or a colour is what transparent pixels keep."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[8:24, 8:24] = (200, 60, 30, 255)
    return Image.fromarray(pixels)


def test_what_is_transparent_shows_the_background_and_not_the_colours_hidden_there(tmp_path):
    """Alpha of 8 bits in PNG and WebP, palettes and one colour by PNG's tRNS, GIF's index."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    solid = Image.new("RGB", (32, 32), (255, 0, 255))
    solid.paste((200, 60, 30), (8, 8, 24, 24))
    palette = solid.quantize(4)
    cut_out(noise).save(tmp_path / "noise.png")
    cut_out((255, 0, 255)).save(tmp_path / "magenta.webp", lossless=True, exact=True)
    solid.save(tmp_path / "one_colour.png", transparency=(255, 0, 255))
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((0, 0)))
    cut_out((255, 0, 255)).save(tmp_path / "a.tif")
    for background in ((255, 255, 255), (10, 20, 30)):
        expected = Image.new("RGB", (32, 32), background)
        expected.paste((200, 60, 30), (8, 8, 24, 24))
        for file in tmp_path.iterdir():
            image, oddities = read_image(file, background)
            assert oddities == ["transparent"] and difference(image, expected) == 0, file.name
    cut_out(0).convert("RGB").convert("RGBA").save(tmp_path / "opaque.png")
    assert read_image(tmp_path / "opaque.png")[1] == []


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path):
    Image.new("RGBA", (4, 4), (100, 200, 0, 51)).save(tmp_path / "a.png")  # a fifth
    assert read_image(tmp_path / "a.png", (0, 0, 255))[0].getpixel((0, 0)) == (20, 40, 204)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_found_at_every_depth(tmp_path, bits):
    """One grey of a PNG is transparent, given in the file's bits: here the lightest; the darkest stays as it is."""
    values = np.repeat([[0, 2**bits - 1]], 8, axis=0).repeat(8, axis=1)  # (8, 16)
    row = values.astype(">u2").view(np.uint8) if bits == 16 else np.packbits(
        (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(8, -1).astype(np.uint8), axis=1
    )  # fmt: skip
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 16, 8, bits, 0, 0, 0, 0),
        b"tRNS": struct.pack(">H", 2**bits - 1),
        b"IDAT": zlib.compress(b"".join(b"\0" + line.tobytes() for line in row)),
        b"IEND": b"",
    }
    written = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items())
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    image, oddities = read_image(tmp_path / "a.png", (9, 8, 7))
    assert oddities == ["16-bit"] * (bits == 16) + ["greyscale", "transparent"]
    assert image.getpixel((0, 0)) == (0, 0, 0) and image.getpixel((15, 0)) == (9, 8, 7)


def test_the_first_of_several_frames_is_read_and_said(photo, tmp_path):
    frames = dict(save_all=True, append_images=[Image.new("RGB", photo.size)])
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        photo.save(tmp_path / name, **frames)
        image, oddities = read_image(tmp_path / name)
        assert oddities == ["several frames"] and difference(image, photo) < 8, name


def test_a_photograph_with_damaged_exif_is_still_one(photo, tmp_path):
    photo.save(tmp_path / "a.jpg", exif=b"Exif\0\0not a TIFF header")
    assert read_image(tmp_path / "a.jpg")[1] == []


def test_floats_and_files_that_only_end_like_images_are_not_read(photo, tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match="floating point values; expected 8 or 16 bits"):
        read_image(tmp_path / "a.tif")
    photo.save(tmp_path / "a.eps")  # Ghostscript would run what is in it
    with pytest.raises(BadImage, match="no known image format"):
        read_image((tmp_path / "a.eps").rename(tmp_path / "a.png"))
