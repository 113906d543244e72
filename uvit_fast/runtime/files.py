"""Files and folders that are whole or not there, and files of rows that outlive a row that is not."""

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` beside `path`, then give it its name; what a failed write leaves is removed.

    Two processes may write the same content under one name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}_{path.name}")
    try:
        write(temporary)
        temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file of rows by column, whole or not at all."""

    def put(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, put)


def file_name(text: str, most: int = 80) -> str:
    """What of a text can stand in a file's name on any system: letters, marks and digits of all scripts, others as hyphens; at most
    `most` bytes of UTF-8.
    """
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", text))
    short = "-".join(kept.split()).encode()[:most].decode(errors="ignore")
    return short.rstrip("-")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """A line of JSON, on a line of its own also where the one before was cut short."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read() == b"\n"
        else:
            whole = True
        file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without those that a crash or a full disk cut short; none where there is no file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
