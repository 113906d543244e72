"""What `uvit-fast data check` says of a folder of images."""

import pytest
from PIL import Image

from uvit_fast.cli import main


@pytest.fixture
def animals(tmp_path):
    folder = tmp_path / "animals"
    for name, count in (("ant", 3), ("bee", 2), ("cat", 0)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 64), "green").save(folder / name / f"{i}.png")
    return folder


def check(folder, capsys):
    code = main(["data", "check", str(folder)])
    return code, capsys.readouterr().out.replace(f"{folder}/", "").replace(str(folder), "all").splitlines()


def test_classes_are_a_table_with_counts_and_the_labels_that_training_gives(animals, capsys):
    (animals / "bee" / "0.png").write_bytes(b"")
    (animals / "bee" / "2.heic").write_bytes(b"")
    assert check(animals, capsys) == (
        1,
        [
            "bee/0.png: zero bytes",
            "3 folders, as classes: model.num_classes=3, or 4 with train.p_uncond, for its null label",
            " label   images  unreadable  class",
            "     0        3           0  ant",
            "     1        2           1  bee",
            "     2        0           0  cat",
            "left out bee/2.heic: not an image by its ending",
            "classes without an image: cat; they keep their labels",
            "all: 5 images, 1 unreadable, 0 unusual",
        ],
    )


def test_tiny_and_extreme_shapes_and_transparency_are_unusual(animals, capsys):
    Image.new("RGB", (15, 64)).save(animals / "ant" / "small.png")
    Image.new("RGBA", (64, 256), (0, 0, 0, 99)).save(animals / "ant" / "tall.png")
    for i in range(9):
        Image.new("RGB", (640, 480)).save(animals / "bee" / f"large{i}.png")
    code, lines = check(animals, capsys)
    assert code == 0
    assert "ant/tall.png: transparent; read as upright RGB" in lines
    assert "ant/tall.png: tiny, extreme shape, 64 x 256 pixels" in lines  # beside most of this folder
    assert "ant/small.png: tiny, extreme shape, 15 x 64 pixels" in lines
    assert lines[-1] == "all: 16 images, 0 unreadable, 7 unusual (7 tiny, 2 extreme shape, 1 transparent)"


def test_a_folder_without_classes_has_no_table(animals, capsys):
    Image.new("RGB", (64, 64)).save(animals / "loose.png")
    assert check(animals, capsys) == (0, ["all: 6 images, 0 unreadable, 0 unusual"])


def test_what_would_refuse_the_classes_is_said(animals, capsys):
    (animals / "dog").symlink_to("gone")
    code, lines = check(animals, capsys)
    assert (code, lines[0]) == (0, "no classes: dog: a link to nothing; expected the folder of a class")
