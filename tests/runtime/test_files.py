"""What has its name is whole, and rows outlive one that is not."""

from pathlib import Path

import pytest

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import append_row, file_name, read_rows, read_table, write_table, write_whole


@pytest.mark.parametrize("folder", [False, True])
def test_a_write_that_fails_leaves_what_was_there(folder, tmp_path):
    path = tmp_path / "new" / "out.npz"

    def write(temporary: Path) -> None:
        assert temporary.suffix == path.suffix  # some writers add one that is missing
        if folder:
            temporary.mkdir()
        (temporary / "part" if folder else temporary).write_text("half")
        raise OSError("disk full")

    write_whole(path, lambda temporary: temporary.write_text("whole"))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, write)
    assert [each.read_text() for each in path.parent.iterdir()] == ["whole"]


def test_a_message_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError) as error:
        write_whole(tmp_path / "there", lambda temporary: temporary.write_text("text"))
    assert error.value.filename == str(tmp_path / "there") and error.value.filename2 is None
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_table_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, ["a", "b"], [{"a": 1, "b": "ä,"}])

    def rows():
        yield {"a": 2, "b": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(path, ["a", "b"], rows())
    assert path.read_text("utf-8").splitlines() == ["a,b", '1,"ä,"'] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected what `uvit-fast x` writes, rows of the columns a, b; got the columns none"),
        ("a,b\n", "got no rows"),
        ("a,c\n1,2\n", "got the columns a, c"),
        ("a,b\n1,2\n\n1\n", "row 2: expected cells as `uvit-fast x` writes them, got '1'"),
        ("a,b\n1,2,3\n", "row 1: expected cells as .* got '1,2,3'"),
        ("a,b\n1,two\n", "row 1: expected cells as .* got '1,two'"),
    ],
)
def test_a_table_is_read_as_it_was_written_or_an_error_names_the_row(text, words, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\ufeff" + text, "utf-8")  # as a spreadsheet saves it
    with pytest.raises(UserError, match=words):
        read_table(path, ["a", "b"], "uvit-fast x", lambda row: float(row["b"]))
    path.write_bytes(b"\xff\xfe\x00")
    for of, came in ((path, "no text"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"expected what .* got {came}"):
            read_table(of, ["a", "b"], "uvit-fast x", lambda row: float(row["b"]))
    write_table(path, ["a", "b"], [{"a": "x", "b": 1.5}])
    assert read_table(path, ["a", "b"], "uvit-fast x", lambda row: float(row["b"])) == [{"a": "x", "b": "1.5"}]
    write_table(path, ["a", "b"], [])
    assert read_table(path, ["a", "b"], "uvit-fast x", lambda row: float(row["b"]), empty=True) == []


def test_a_row_that_was_cut_short_costs_itself_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_row(path, {"step": 1})
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "lo')  # a full disk
    append_row(path, {"step": 3})
    with open(path, "ab") as file:
        file.write(b"\0\0\0\n[4]\n")  # a power cut
    append_row(path, {"step": 5})
    assert read_rows(path) == [{"step": 1}, {"step": 3}, {"step": 5}]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a green train", "a-green-train"),
        ("Grüne 火车, Жар-птица", "Grüne-火车-Жар-птица"),
        ("u\u0308ber नमस्ते", "über-नमस्ते"),  # vowel signs are marks, no letters
        ("../../etc/passwd\0\n", "etc-passwd"),
        ('C:\\con|<>*?"', "C-con"),
        ("caf\udce9 \u202e ☺", "caf"),  # not UTF-8; turns the direction of text; no letter
        ("...", ""),
        ("火" * 100, "火" * 26),  # a file system counts bytes
    ],
)
def test_a_files_name_keeps_letters_of_all_scripts_and_nothing_that_a_system_minds(text, name):
    assert file_name(text) == name
