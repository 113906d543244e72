"""What of a folder is an image, and which label it has."""

import json
import os

import pytest
from PIL import Image

from uvit_fast.data.image_folder import ImageFolder
from uvit_fast.data.reading import list_images, read_image
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import UserError


def add(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "green").save(file, format="PNG")


@pytest.fixture
def animals(tmp_path):
    """Three classes of two images."""
    folder = tmp_path / "animals"
    add(*(folder / name / f"{i}.png" for name in ("ant", "bee", "cat") for i in range(2)))
    return folder


def labels(folder):
    listing = list_images(folder, labelled=True)
    return dict(zip(listing.files, (listing.classes[label] for label in listing.labels))), listing


def test_folders_that_are_links_are_classes_like_others(animals, tmp_path):
    (animals / "bee").rename(tmp_path / "store")
    (animals / "bee").symlink_to(tmp_path / "store")
    (animals / "cat" / "0.png").rename(tmp_path / "elsewhere.png")
    (animals / "cat" / "0.png").symlink_to("../../elsewhere.png")
    found, listing = labels(animals)
    assert listing.classes == ["ant", "bee", "cat"] and listing.counts == {"ant": 2, "bee": 2, "cat": 2}
    assert found["bee/1.png"] == "bee" and found["cat/0.png"] == "cat" and listing.notes == []


def test_a_run_continues_with_the_classes_that_it_wrote(animals):
    now = Provenance.of(ImageFolder(str(animals), 4, "center", False, labelled=True))
    before = Provenance.from_json(json.loads(json.dumps(now.as_json())))
    assert now.classes == ("ant", "bee", "cat") and before.difference(now) is None


def test_a_link_back_is_refused_and_a_folder_reached_twice_said(animals):
    (animals / "dog").symlink_to("ant")
    notes = list_images(animals, labelled=True).notes
    assert len(notes) == 1 and notes[0].startswith("reached by more than one way") and notes[0][-3:] in ("ant", "dog")
    (animals / "cat" / "all").symlink_to(animals)
    for labelled in (True, False):
        with pytest.raises(UserError, match="cat/all: leads back to a folder that contains it"):
            list_images(animals, labelled)


def test_links_to_nothing_cost_no_label_without_a_word(animals):
    (animals / "cat" / "0.png").unlink()
    (animals / "cat" / "0.png").symlink_to("gone.png")
    (animals / "cat" / "more").symlink_to("gone")
    (animals / "cat" / "round").symlink_to("round")
    found, listing = labels(animals)
    assert "cat/0.png" in found  # reading it names it
    assert listing.notes == ["left out cat/more, cat/round: a link to nothing"]
    (animals / "dog").symlink_to("gone")
    with pytest.raises(UserError, match="dog: a link to nothing; expected the folder of a class"):
        list_images(animals, labelled=True)


def test_hidden_and_system_folders_are_no_classes_and_their_copies_no_images(animals):
    expected = labels(animals)[0]
    add(
        animals / ".ipynb_checkpoints" / "0-checkpoint.png", animals / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png"
    )
    add(
        animals / "__MACOSX" / "ant" / "._0.png",
        animals / "ant" / "._0.png",
        animals / ".Trash-1000" / "files" / "0.png",
    )
    add(animals / "ant" / "@eaDir" / "0.png" / "SYNOPHOTO_THUMB_M.jpg", animals / "$RECYCLE.BIN" / "0.png")
    found, listing = labels(animals)
    assert found == expected and listing.classes == ["ant", "bee", "cat"] and len(listing.ignored) == 7
    assert listing.notes[0].startswith("left out 7") and "hidden, or the system's" in listing.notes[0]
    add(animals.parent / ".cache" / "0.png")
    assert list_images(animals.parent / ".cache", labelled=False).files == ["0.png"]  # a name above does not hide


def test_a_class_without_images_keeps_its_label_and_is_named(animals):
    for file in (animals / "bee").iterdir():
        file.rename(file.with_suffix(".heic"))
    (animals / "ark").mkdir()
    found, listing = labels(animals)
    assert listing.classes == ["ant", "ark", "bee", "cat"] and found["cat/0.png"] == "cat"
    assert listing.counts == {"ant": 2, "ark": 0, "bee": 0, "cat": 2}
    assert listing.notes == [
        "left out bee/0.heic, bee/1.heic: not an image by its ending",
        "classes without an image: ark, bee; they keep their labels",
    ]
    with pytest.warns(UserWarning, match="animals: classes without an image: ark, bee"):
        assert ImageFolder(str(animals), 4, "center", False, True).num_classes == 4


@pytest.mark.parametrize("ending", "tif TIFF gif jfif avif jp2 JPEG bmp ppm tga qoi".split())
def test_what_pillow_reads_is_listed_and_read(ending, tmp_path):
    file = tmp_path / f"a.{ending}"
    Image.new("RGB", (8, 8), (0, 200, 0)).save(file, format="JPEG" if ending == "jfif" else None)
    assert list_images(tmp_path, labelled=False).files == [file.name]
    red, green, blue = read_image(file)[0].getpixel((4, 4))
    assert red < 9 and abs(green - 200) < 9 and blue < 9


def test_images_in_deeper_folders_are_their_class_and_said(animals):
    add(animals / "ant" / "red" / "0.png")
    found, listing = labels(animals)
    assert found["ant/red/0.png"] == "ant"
    assert listing.notes == ["below the folders of the classes, and counted as theirs: ant/red/0.png"]


def test_what_only_looks_like_a_file_is_never_opened(animals):
    os.mkfifo(animals / "ant" / "pipe.png")
    assert list_images(animals, labelled=True).ignored == ["ant/pipe.png"]


def test_names_that_are_not_utf8_are_listed_and_can_be_printed(animals):
    os.rename(animals / "ant" / "0.png", os.fsencode(animals / "ant") + b"/caf\xe9\n.png")
    os.mkdir(os.fsencode(animals) + b"/z\xfc")
    listing = list_images(animals, labelled=True)
    assert read_image(animals / listing.files[1])[0].size == (4, 4) and listing.classes[3] == "z\udcfc"
    assert listing.notes == ["classes without an image: z\\udcfc; they keep their labels"]


def test_nothing_to_read_says_what_there_is_instead(animals):
    for file in animals.rglob("*.png"):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(
        UserError, match=r"no images; expected .*\.png.*; got 6 \(6 .heic\), such as ant/0.heic: not an"
    ):
        list_images(animals, labelled=False)


def test_other_files_are_listed_as_ignored_and_loose_images_refused(tmp_path):
    add(tmp_path / "cat" / "A.PNG")
    (tmp_path / "notes.txt").write_text("")
    listing = list_images(tmp_path, labelled=True)
    assert (listing.files, listing.labels, listing.classes) == (["cat/A.PNG"], [0], ["cat"])
    assert listing.ignored == ["notes.txt"]
    add(tmp_path / "loose.png")
    with pytest.raises(UserError, match="one folder per class"):
        list_images(tmp_path, labelled=True)


def test_a_folder_that_cannot_be_listed_is_named_and_not_passed_over(tmp_path, monkeypatch):
    add(tmp_path / "cat" / "a.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="cat: cannot be listed .Permission denied."):
        list_images(tmp_path, labelled=True)
