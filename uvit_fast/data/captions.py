"""The captions of a folder's images: COCO's file, a table, or text files beside the images.

- COCO's format: `{"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}`; images in the
order
  of their ids.
- A table with a header, .csv, .tsv or .txt, or .jsonl with one object per line: a column of file names, a column of
  captions, one caption per row (or, in .jsonl, a list of them). Names are relative to the folder of the images. In that
  folder, or below it, the table may be `metadata.jsonl` or `metadata.csv`, as in image folders on the Hugging Face hub;
  names are then relative to the table's own folder.
- `photo.txt` or `photo.caption` beside `photo.jpg`: one caption per line.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from uvit_fast.data.reading import Listing, list_images, shown
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import cut

TABLES = (".jsonl", ".csv", ".tsv", ".txt")
BESIDE = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_name", "path")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "comment", "description")
SEPARATORS = ",\t;|"


def list_captioned(folder: Path, captions: Path | None) -> tuple[Listing, list[list[str]]]:
    """Return the images of a folder and the captions of each, which may be none.

    Args:
        captions: COCO's .json, or a table; None: the folder's metadata tables, else text files beside the images.

    Raises:
        UserError: no such file, no captions, or captions of an image that is not below `folder`.
    """
    if captions is not None and captions.suffix.lower() not in TABLES:
        return _coco(folder, captions)
    listing = list_images(folder, labelled=False)
    if captions is not None:
        return listing, _of_tables(listing, [(captions, "")])
    tables = [path for path in listing.ignored if path.rsplit("/", 1)[-1] in METADATA]
    if tables:
        texts = _of_tables(listing, [(folder / path, path.rpartition("/")[0]) for path in tables])
    else:
        texts, tables = _beside(listing)
    if not any(texts):
        raise UserError(
            f"{shown(str(folder))}: no captions; expected --captions FILE, or in the folder "
            f"{' or '.join(METADATA)}, or a "
            f"{' or '.join(BESIDE)} file beside each image"
        )
    used = set(tables)
    left_out = {why: [path for path in paths if path not in used] for why, paths in listing.left_out.items()}
    return replace(listing, left_out={why: paths for why, paths in left_out.items() if paths}), texts


def _coco(folder: Path, captions: Path) -> tuple[Listing, list[list[str]]]:
    try:
        tree = json.loads(captions.read_text("utf-8"))
        names = {int(image["id"]): str(image["file_name"]) for image in tree["images"]}
        texts: dict[int, list[str]] = {number: [] for number in names}
        for note in sorted(tree["annotations"], key=lambda note: note["id"]):
            texts[int(note["image_id"])].append(str(note["caption"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{captions}: expected COCO captions, with images and annotations, or a .jsonl or .csv table "
            f"({type(error).__name__}: {error})"
        ) from None
    order = sorted(names)
    _refuse_missing(folder, captions, [name for name in names.values() if not _lies_below(folder, name)], len(names))
    return Listing(folder, [names[i] for i in order], None, []), [texts[i] for i in order]


def _of_tables(listing: Listing, tables: list[tuple[Path, str]]) -> list[list[str]]:
    """Return each image's captions from tables, each with its folder below the listing's, where its names are."""
    texts: dict[str, list[str]] = {name: [] for name in listing.files}
    for table, below in tables:
        rows = _json_lines(table) if table.suffix.lower() == ".jsonl" else _separated(table)
        missing, count = [], 0
        for name, caption in rows:
            absolute = os.path.isabs(name)
            path = os.path.relpath(name, listing.folder) if absolute else os.path.normpath(os.path.join(below, name))
            count += 1
            if path not in texts:
                missing.append(name)
                continue
            several = caption if isinstance(caption, list) else [caption]
            texts[path] += [text for each in several if each is not None and (text := str(each).strip())]
        _refuse_missing(listing.folder / below, table, missing, count)
    return [texts[name] for name in listing.files]


def _json_lines(table: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(table), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{shown(str(table))}, line {number}: expected a JSON object, got {cut(line.strip())}")
        name, text = _columns(table, list(row))
        yield str(row[name]), row[text]


def _separated(table: Path) -> Iterator[tuple[str, Any]]:
    lines = _lines(table)
    first = lines[0] if lines else ""
    separator = max(SEPARATORS, key=first.count)
    rows = csv.DictReader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        name, text = _columns(table, [*(rows.fieldnames or [])])
        for row in rows:
            if None in row:
                raise csv.Error("more fields than the header; a caption with the separator stands in quotes")
            yield (row[name] or "").strip(), row[text]
    except csv.Error as error:
        raise UserError(
            f"{shown(str(table))}, line {rows.reader.line_num}: expected a table of {separator!r} ({error})"
        ) from None


def _columns(table: Path, columns: list[str]) -> tuple[str, str]:
    """Return the columns of file names and captions: by their usual names, the second otherwise the only other one."""
    kinds = {column.strip().lower(): column for column in columns if column is not None}
    name = next((kinds[kind] for kind in FILE_COLUMNS if kind in kinds), None)
    rest = [column for column in columns if column != name]
    text = next((kinds[kind] for kind in TEXT_COLUMNS if kind in kinds), rest[0] if len(rest) == 1 else None)
    if name is None or text is None:
        wanted = f"one of {', '.join(FILE_COLUMNS)}" if name is None else f"one of {', '.join(TEXT_COLUMNS)}"
        raise UserError(
            f"{shown(str(table))}: expected a column called {wanted}, got {cut(', '.join(map(str, columns)))}"
        )
    return name, text


def _beside(listing: Listing) -> tuple[list[list[str]], list[str]]:
    """Return each image's captions from the text file beside it, and the paths of these files."""
    files = [path for path in listing.ignored if path.endswith(BESIDE)]
    stems = {os.path.splitext(path)[0]: path for path in reversed(files)}
    found = [stems.get(os.path.splitext(name)[0]) for name in listing.files]
    texts = [_lines(listing.folder / path) if path else [] for path in found]
    return [[line.strip() for line in lines if line.strip()] for lines in texts], [path for path in found if path]


def _lines(file: Path) -> list[str]:
    """Return the lines as editors end them; a caption may contain other characters at which Unicode breaks lines. A
    byte order mark is dropped.
    """
    try:
        with open(file, encoding="utf-8-sig", newline=None) as opened:
            return opened.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(str(file))}: expected captions as UTF-8 text ({error})") from None


def _lies_below(folder: Path, name: str) -> bool:
    path = os.path.normpath(name)
    return not os.path.isabs(path) and not path.startswith("..") and (folder / path).is_file()


def _refuse_missing(folder: Path, captions: Path, missing: list[str], count: int) -> None:
    if not count:
        raise UserError(f"{shown(str(captions))}: expected captions of images, got none")
    if missing:
        raise UserError(
            f"{shown(str(folder))}: lacks {len(missing)} of {count} images that {shown(str(captions))} names, such as "
            f"{shown(missing[0])}"
        )
