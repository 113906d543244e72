"""What is printed of an error is so."""

import os
from pathlib import Path

import pytest

from uvit_fast.runtime.errors import words


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda: os.mkdir("folder"), "folder: expected a new name, got a folder that is there"),
        (lambda: os.symlink("file", "folder"), "folder: expected a new name, got a folder that is there"),
        (lambda: Path("file").mkdir(exist_ok=True), "file: expected a folder, got a file"),
        (lambda: Path("file/a/b").mkdir(parents=True), "file: expected a folder, got a file"),
        (lambda: os.listdir("file"), "file: expected a folder, got a file"),
        (lambda: os.rename("folder", "file"), "file: expected a folder, got a file"),
        (lambda: open("folder/nothing"), "folder/nothing: No such file or directory"),
    ],
)
def test_a_path_that_cannot_be_used_is_told_why(fails, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(OSError) as error:
        fails()
    assert words(error.value) == expected
