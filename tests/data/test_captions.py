"""Captions as users have them: COCO's file, tables, the hub's metadata, texts beside the images."""

import json

import pytest
from PIL import Image

from uvit_fast.data.captions import list_captioned
from uvit_fast.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """a.png, b/c.png and b/d.jpg."""
    (tmp_path / "images" / "b").mkdir(parents=True)
    for name in ("a.png", "b/c.png", "b/d.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    return tmp_path / "images"


def captions_of(folder, file=None):
    listing, texts = list_captioned(folder, file)
    return dict(zip(listing.files, texts)), listing


def rows(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file_name,text\na.png,\"red, round\"\na.png, ü火车 \nb/d.jpg,two\n"),
        ("t.csv", "\ufefffile_name;text\r\na.png;red, round\r\na.png;ü火车\r\nb/d.jpg;two\r\n"),  # as Excel does
        ("t.txt", "image_name| comment_number| comment\na.png| 0| red, round\na.png| 1| ü火车\nb/d.jpg| 0| two\n"),
        ("t.tsv", "number\tpath\tcaption\n1\ta.png\tred, round\n2\ta.png\tü火车\n3\t./b/d.jpg\ttwo\n4\tb/c.png\t\n"),
        ("t.jsonl", rows({"file_name": "a.png", "text": ["red, round", "ü火车", " "]},
                         {"file_name": "b/d.jpg", "text": "two"})),
        ("t.jsonl", rows({"image": "a.png", "label": "red, round"}, {"image": "a.png", "label": "ü火车"},
                         {"image": "b/d.jpg", "label": "two"}, {"image": "b/c.png", "label": None})),
    ],
)  # fmt: skip
def test_a_table_has_a_row_a_caption(folder, name, text):
    file = folder.parent / name
    file.write_bytes(text.encode())
    found, listing = captions_of(folder, file)
    assert found == {"a.png": ["red, round", "ü火车"], "b/c.png": [], "b/d.jpg": ["two"]}
    assert not listing.ignored


def test_metadata_of_the_hubs_image_folders_is_found(folder):
    """Names are below the table's own folder; without --captions."""
    (folder / "metadata.jsonl").write_text(rows({"file_name": "a.png", "text": "red"}))
    (folder / "b" / "metadata.csv").write_text("file_name,text\nd.jpg,blue\n")
    (folder / "notes.md").write_text("")
    found, listing = captions_of(folder)
    assert found == {"a.png": ["red"], "b/c.png": [], "b/d.jpg": ["blue"]}
    assert listing.ignored == ["notes.md"]  # the tables were read


def test_texts_beside_the_images_have_a_caption_a_line(folder):
    (folder / "a.txt").write_text("\ufeffa red\u2028ball\n\n  round \n", "utf-8")
    (folder / "b" / "c.caption").write_text("blue")
    (folder / "README.txt").write_text("of something else")
    found, listing = captions_of(folder)
    assert found == {"a.png": ["a red\u2028ball", "round"], "b/c.png": ["blue"], "b/d.jpg": []}
    assert listing.ignored == ["README.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"file_name,text\nx.png,a\n", "lacks 1 of 1 images that .*t.csv names, such as x.png"),
        ("t.csv", b"file_name,text\n../images/../x.png,a\n", "lacks 1 of 1 images"),
        ("t.csv", b"file_name,text\na.png,a red, round ball\n", "line 2: .*more fields than the header"),
        ("t.csv", b'file_name,text\na.png,"a red\n', "line 2: expected a table of ','"),
        ("t.csv", b"name,text\na.png,a\n", "expected a column called one of file_name, .*got name, text"),
        ("t.csv", b"file_name,x,y\na.png,a,b\n", "expected a column called one of text, .*got file_name, x, y"),
        ("t.csv", b"", "expected a column called"),
        ("t.csv", b"file_name,text\n", "expected captions of images, got none"),
        ("t.csv", b"file_name,text\na.png,\xff\n", "expected captions as UTF-8 text"),
        ("t.jsonl", b'{"file_name": "a.png", "text": "a"}\n{"file_name"\n', "line 2: expected a JSON object"),
        ("t.json", b'{"images": [{"id": 1, "file_name": "../images/a.png"}], "annotations": []}', "lacks 1 of 1"),
        ("t.json", b"[]", "expected COCO captions"),
        ("t.csv", None, "expected captions as UTF-8 text"),
        (None, None, "images: no captions; expected --captions FILE, or in the folder metadata.jsonl"),
    ],
)
def test_a_mistake_names_the_file_and_what_was_expected(folder, name, content, words):
    if content is not None:
        (folder.parent / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        list_captioned(folder, name and folder.parent / name)
    assert "\n" not in str(error.value)
