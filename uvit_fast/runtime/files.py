"""Write files whole or not at all, and files of rows that survive a row cut short."""

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import cut, shown


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` beside `path`, then rename the file; a failed write leaves nothing behind.

    Two processes may write the same content under one name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}_{path.name}")
    try:
        write(temporary)
        temporary.rename(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):  # a name that nobody knows
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    except SafetensorError as error:  # its own kind, of a full disk too
        raise OSError(f"{path}: {error}") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def other_than(path: str | os.PathLike) -> str:
    """Return what there is in place of a file or folder that was expected, as an error says what came."""
    return "another kind of file" if os.path.exists(path) else "nothing of that name"


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file of rows by column, whole or not at all."""

    def put(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, put)


def read_table(
    path: Path,
    columns: Sequence[str],
    command: str,
    parse: Callable[[dict[str, str]], object],
    *,
    empty: bool = False,
) -> list[dict[str, str]]:
    """Return the rows of a CSV file that `command` wrote with `columns`, as a spreadsheet may have saved it.

    Args:
        parse: `parse(row)` fails where a cell does not hold what it should.
        empty: whether a table without rows will do.

    Raises:
        UserError: it is another table, no table, or one of its rows was changed.
    """
    rows: list[dict] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), list(reader.fieldnames or ["none"])
            came = "no rows" if names == list(columns) else f"the columns {cut(', '.join(names))}"
    except IsADirectoryError:
        names, came = [], "a folder"
    except (ValueError, csv.Error):  # bytes of something else
        names, came = [], "no text"
    if names != list(columns) or not (rows or empty):
        wanted = f"expected what `{command}` writes, rows of the columns {', '.join(columns)}"
        raise UserError(f"{path}: {wanted}; got {came}")
    for number, row in enumerate(rows, 1):
        try:
            parse(row)
            fits = None not in row and None not in row.values()
        except (ValueError, TypeError, AttributeError):  # of a number, or of a cell that is not there
            fits = False
        if not fits:
            more = row.pop(None, [])
            came = shown(",".join([*filter(None, row.values()), *more]))
            raise UserError(f"{path}: row {number}: expected cells as `{command}` writes them, got {came}")
    return rows


def file_name(text: str, most: int = 80) -> str:
    """Return the part of a text that can stand in a file's name on any system: letters, marks and digits of all
    scripts, others as hyphens; at most `most` bytes of UTF-8.
    """
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", text))
    short = "-".join(kept.split()).encode()[:most].decode(errors="ignore")
    return short.rstrip("-")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a line of JSON, on a line of its own even if the one before was cut short."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read() == b"\n"
        else:
            whole = True
        file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file, without those that a crash or a full disk cut short; [] without a file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
