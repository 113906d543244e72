"""Images of folders and of ADM's files: the same pixels from either, read in pieces; what is neither is refused."""

import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.test_features import MeanColours, folder_of, npz_of, pictures
from uvit_fast.evaluation import sources as files
from uvit_fast.evaluation.features import extract
from uvit_fast.measuring import open_images
from uvit_fast.runtime.errors import UserError


def test_a_folder_and_an_npz_give_the_same_features(tmp_path):
    """Also with batches that do not divide them, a compressed .npz, and the overview of `uvit-fast sample` in the
    folder.
    """
    images = pictures(23)
    folder = folder_of(images, tmp_path / "folder")
    Image.new("RGB", (100, 50)).save(folder / "grid.png")
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    sources = [open_images(p) for p in (folder, npz_of(tmp_path / "x.npz", arr_0=images), tmp_path / "small.npz")]
    expected = images.reshape(23, -1, 3).mean(1) / 255
    for source in sources:
        first, third = source.read([range(2), range(4, 7)])  # a share of several processes
        assert np.array_equal(first, images[:2]) and np.array_equal(third, images[4:7])
        found = extract(source, MeanColours(), batch=5, progress=False)
        np.testing.assert_allclose(found.pool, expected, rtol=1e-5)
        np.testing.assert_allclose(found.pool_statistics.sigma, np.cov(expected, rowvar=False), rtol=1e-5)
        assert found.size == (8, 8) and source.count == 23 and not found.warnings


def test_an_npz_is_read_in_pieces(tmp_path):
    """Taking one batch of many leaves the rest of the file unread."""
    path = npz_of(tmp_path / "x.npz", arr_0=pictures(400))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\0" * 1000 + whole[len(whole) // 2 + 1000 :])  # a broken checksum
    first = next(open_images(path).read([range(10)]))
    np.testing.assert_array_equal(first, pictures(400)[:10])


def test_grey_images_are_taken_as_rgb(tmp_path):
    grey = pictures(6)[..., :1]
    found = extract(open_images(npz_of(tmp_path / "x.npz", arr_0=grey)), MeanColours(), progress=False)
    assert (found.pool == found.pool[:, :1]).all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((4, 8, 8, 3), np.nan, np.float32), "expected uint8"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"expected uint8 \(N, H, W, 3\), got uint8 \(4, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "got none"),
        (np.array([["a", None]]), "got object"),
        (np.zeros((9, 8, 8, 3), np.uint8), "every image is of one colour, as black ones are"),
        (pictures(1), "at least 2 images"),
    ],
)
def test_images_that_cannot_be_measured_are_refused(array, words, tmp_path):
    with pytest.raises(UserError, match=words):
        extract(open_images(npz_of(tmp_path / "x.npz", arr_0=array)), MeanColours(), progress=False)


def test_folders_that_hold_no_equal_images_are_refused(tmp_path):
    folder = folder_of(pictures(3), tmp_path / "a")
    Image.new("RGB", (9, 8)).save(folder / "0001.png")
    with pytest.raises(UserError, match="0001.png: expected 8 x 8 pixels as in the folder's first image, got 9 x 8"):
        extract(open_images(folder), MeanColours(), progress=False)
    (folder / "0000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="0000.png: not a readable image"):
        extract(open_images(folder), MeanColours(), progress=False)
    (tmp_path / "b").mkdir()
    for path, words in ((tmp_path / "b", "no images"), (tmp_path / "c", "got nothing of that name")):
        with pytest.raises(UserError, match=words):
            open_images(path)


def broken_files(whole):
    """An .npz that is cut, changed, or of something else, and what is said of it."""
    half = len(whole) // 2
    yield whole[:half], "no readable .npz"
    yield b"", "no readable .npz"
    yield whole[:60] + b"\0" * 20 + whole[80:], "no readable .npz with arr_0"  # numpy's header
    yield whole[:half] + b"\0" * 1000 + whole[half + 1000 :], "arr_0"  # the checksum, or the compressed stream
    yield b"\x93NUMPY" + whole, "no readable .npz|arr_0"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_broken_npz_is_one_line(save, tmp_path):
    """Whether it is opened or read to its end."""
    path = tmp_path / "x.npz"
    save(path, arr_0=np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3)).astype(np.uint8))
    for data, words in broken_files(path.read_bytes()):
        path.write_bytes(data)
        try:
            images = list(open_images(path).read([range(50), range(50, 100)]))
        except UserError as error:
            assert re.search(words, str(error)) and "\n" not in str(error) and str(path) in str(error)
        else:
            assert len(data) > 1000 and sum(map(len, images)) == 100  # bytes before the archive


def test_a_header_that_lies_about_the_images_is_refused(tmp_path):
    """10^18 of them would take the memory of their batches' list."""
    path = npz_of(tmp_path / "x.npz", arr_0=pictures(4))
    with zipfile.ZipFile(path) as archive:
        data = archive.read("arr_0.npy")
    for told in (b"(10**18, 8, 8, 3)", b"(1000000000000000000, 8, 8, 3)", b"(-4, -8, 8, 3)", b"(5, 8, 8, 3)"):
        lie = data.replace(b"(4, 8, 8, 3)", told)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", lie[:8] + (len(lie) - 10 - 768).to_bytes(2, "little") + lie[10:])
        with pytest.raises(UserError, match="arr_0"):
            open_images(path)


def test_what_a_folder_holds_beyond_images_is_named(tmp_path):
    """One reader for training and evaluation; overviews of samples are left out, the own one without a word."""
    folder = folder_of(pictures(6), tmp_path / "samples")
    for name in ("grid.png", "more/grid.png", "more/6.png", ".hidden/7.png", "notes.txt", "8.tmp"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pictures(1)[0]).save(folder / name, "png")
    images = open_images(folder)
    assert images.count == 7 and len(images.warnings) == 3
    for words in (".hidden", "notes.txt", "8.tmp", "more/grid.png"):
        assert words in "".join(images.warnings)
    (tmp_path / "only").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "only" / "grid.png")
    with pytest.raises(UserError, match="no images but grid.png"):
        open_images(tmp_path / "only")


def test_a_folder_is_read_as_training_reads_it(tmp_path):
    """16-bit greys, turned pictures, transparent ones, links: the figures are those of the plain pictures."""
    image = pictures(1)[0]
    grey = image[..., 0]
    turned = Image.Exif()
    turned[0x112] = 6
    plain, odd = tmp_path / "plain", tmp_path / "odd"
    plain.mkdir()
    odd.mkdir()
    white = np.full((8, 8, 3), 255, np.uint8)
    clear = np.dstack([image, np.zeros((8, 8), np.uint8)])
    for i, x in enumerate((grey, image, white, image)):
        Image.fromarray(x).save(plain / f"{i}.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(odd / "0.png")
    Image.fromarray(np.rot90(image)).save(odd / "1.png", exif=turned)
    Image.fromarray(clear).save(odd / "2.png")
    (odd / "3.png").symlink_to(plain / "3.png")
    (first,), (second,) = (open_images(folder).read([range(4)]) for folder in (plain, odd))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("shape", "stored", "words"),
    [
        ((10**12,), 0, "mu: not readable as an array of numbers"),  # the header alone would take the memory
        ((1000,), 1000 * 8, "mu: expected at most 1,000 bytes, got"),  # and here what is packed would
    ],
)
def test_an_array_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, shape, stored, words):
    monkeypatch.setattr(files, "LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mu.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
        file.write(bytes(stored))
    with pytest.raises(UserError, match=words):
        files.read_arrays(tmp_path / "x.npz", ["mu"])
