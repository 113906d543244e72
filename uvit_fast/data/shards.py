"""Arrays too long for one file: packed .npy shards, memory-mapped, described by a manifest.

A folder holds `manifest.json` and its shards. The manifest's "arrays" describe each array by name: `dtype`, `shape` of
an item, `count`, and `shards`, a list of {file, count, sha256} in order. Each shard is a plain .npy of (count, *shape),
readable by NumPy alone. The manifest's other keys say where the data came from.

A file has its name only once it is complete: it is written under a temporary name, flushed to disk, and renamed.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World
from uvit_fast.runtime.progress import Bar
from uvit_fast.runtime.text import cut, shown

FORMAT = "uvit-fast shards 1"


class Packed:
    """One array of a folder, read at random.

    Args:
        folder: with a manifest. manifest: from `read_manifest`. name: of the array.
        without: shard files to leave untouched; their items count, but cannot be taken.

    Raises:
        UserError: the manifest has no such array, or a shard is missing, truncated or not of the manifest's shape.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], name: str, without: frozenset[str] = frozenset()):
        if name not in manifest["arrays"]:
            raise UserError(
                f"{folder}: no array {name}; expected it beside {', '.join(manifest['arrays']) or 'nothing'}"
            )
        entry = manifest["arrays"][name]
        self._source = folder, manifest, name, without
        self.dtype, self.shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        self._shards = [
            None if shard["file"] in without else _map(folder, shard, self.dtype, self.shape)
            for shard in entry["shards"]
        ]
        counts = [shard["count"] for shard in entry["shards"]]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.lost = np.repeat([shard is None for shard in self._shards], counts).astype(bool)  # (items,)
        if len(self) != entry["count"]:
            raise UserError(f"{folder}: the shards of {name} hold {len(self)} items, expected {entry['count']}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __reduce__(self) -> tuple:
        return Packed, self._source  # another process maps the files itself, rather than receiving their content

    def take(self, indices: list[int]) -> np.ndarray:
        """Return copies of the items at `indices`: (len(indices), *shape)."""
        taken = np.empty((len(indices), *self.shape), self.dtype)
        shards = np.searchsorted(self._ends, indices, side="right").tolist()
        for row, (index, shard) in enumerate(zip(indices, shards)):
            taken[row] = self._shards[shard][index - int(self._ends[shard])]
        return taken

    def all(self) -> np.ndarray:
        """Return the whole array in memory; for small ones with all shards present."""
        return np.concatenate([np.empty((0, *self.shape), self.dtype), *self._shards])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished folder.

    Raises:
        UserError: there is none, or it is damaged or of another format.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        raise UserError(f"{folder}: no manifest.json; expected a folder that `uvit-fast extract` has finished")
    try:
        manifest = json.loads(file.read_text("utf-8"))
        found = manifest["format"]
        if found == FORMAT:
            _check(manifest["arrays"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = cut(f"{type(error).__name__}: {error}")
        raise UserError(f"{file}: damaged; expected a manifest of format {FORMAT!r} ({why})") from None
    if found != FORMAT:
        raise UserError(f"{file}: expected format {FORMAT!r}, got {shown(found)}")
    return manifest


def _check(arrays: dict[str, Any]) -> None:
    """Raise a KeyError, TypeError or ValueError if a manifest's arrays are not as `describe` returns them, with shards
    in their folder.
    """
    for name, entry in arrays.items():
        counts = [shard["count"] for shard in entry["shards"]]
        if np.dtype(entry["dtype"]).hasobject or not all(type(n) is int and n >= 0 for n in [*entry["shape"], *counts]):
            raise ValueError(f"{name} is no array of numbers")
        for shard in entry["shards"]:
            if Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"{shard['file']} is no name of a file in the folder")
            if not isinstance(shard["sha256"], str) or type(entry["count"]) is not int:
                raise TypeError(f"{name} has no checksum or count")


def write_manifest(folder: Path, arrays: dict[str, Any], **about: Any) -> None:
    """Write manifest.json: the `arrays`, from `describe`, and JSON values that say where the data came from."""
    write_json(folder / "manifest.json", {"format": FORMAT, **about, "arrays": arrays})


def describe(array_shards: list[dict[str, Any]], dtype: np.dtype | str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the manifest's entry for an array whose shards `write_shard` returned."""
    count = sum(shard["count"] for shard in array_shards)
    return {"dtype": str(np.dtype(dtype)), "shape": list(shape), "count": count, "shards": array_shards}


def write_shard(folder: Path, file: str, items: np.ndarray) -> dict[str, Any]:
    """Write `items` (count, *shape) as a shard; return its entry in the manifest.

    Raises:
        OSError: from the file system; no file of that name is left.
    """
    content = io.BytesIO()
    np.save(content, items, allow_pickle=False)
    write_bytes(folder / file, content.getbuffer())
    return {"file": file, "count": len(items), "sha256": hashlib.sha256(content.getbuffer()).hexdigest()}


def pack(folder: Path, arrays: dict[str, np.ndarray], shard_items: int = 8192, **about: Any) -> None:
    """Write arrays that fit in memory as a finished folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, array in arrays.items():
        parts = [array[first : first + shard_items] for first in range(0, len(array), shard_items)]
        written = [write_shard(folder, f"{name}-{i:05d}.npy", part) for i, part in enumerate(parts)]
        entries[name] = describe(written, array.dtype, array.shape[1:])
    write_manifest(folder, entries, **about)


def faults(folder: Path) -> list[str]:
    """Read every shard of a finished folder; return a line for each missing, truncated or altered one."""
    entries = read_manifest(folder)["arrays"].values()
    found = [shard_fault(folder, shard) for entry in entries for shard in entry["shards"]]
    return [fault for fault in found if fault]


def unchecked_faults(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Return `faults` by file, but read a file that had the right checksum again only if its size or time changed.

    `verified.json` in the folder records those; where it cannot be written, every call reads everything.
    """
    note = folder / "verified.json"
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    every = [shard for entry in manifest["arrays"].values() for shard in entry["shards"]]
    marks = {}
    for shard in every:
        file = folder / shard["file"]
        if file.is_file():
            marks[shard["file"]] = [shard["sha256"], file.stat().st_size, file.stat().st_mtime_ns]
    unread = [
        shard for shard in every if shard["file"] not in marks or known.get(shard["file"]) != marks[shard["file"]]
    ]
    if not unread:
        return {}
    found = {}
    quiet = World().rank > 0 or len(unread) < 10
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:  # hashing lets other threads run
        results = pool.map(lambda shard: shard_fault(folder, shard), unread)
        bar = Bar(results, what="checksums", unit="shards", total=len(unread), quiet=quiet)
        for shard, fault in zip(unread, bar):
            if fault:
                found[shard["file"]] = fault
    with contextlib.suppress(OSError):
        write_json(note, {file: mark for file, mark in marks.items() if file not in found})
    return found


def shard_fault(folder: Path, shard: dict[str, Any]) -> str | None:
    """Return what is wrong with a shard's file, or None if its checksum is right."""
    file = folder / shard["file"]
    if not file.is_file():
        return f"{file}: missing"
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return None if digest == shard["sha256"] else f"{file}: wrong checksum (truncated or changed since it was written)"


def write_json(file: Path, value: Any) -> None:
    write_bytes(file, json.dumps(value, indent=1).encode())


def write_bytes(file: Path, content: bytes | memoryview) -> None:
    """Write the file, whole or not at all. Two processes may write the same content under one name."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.rename(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_full(error: OSError) -> bool:
    """Return whether the disk, or the user's quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _map(folder: Path, shard: dict[str, Any], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    file = folder / shard["file"]
    if not file.is_file():
        raise UserError(f"{file}: missing, though the manifest names it")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file}: truncated or not an .npy file ({' '.join(str(error).split())})") from None
    if array.shape != (shard["count"], *shape) or array.dtype != dtype:
        raise UserError(f"{file}: expected {dtype} of {(shard['count'], *shape)}, got {array.dtype} of {array.shape}")
    return array.view(np.ndarray)  # indexing a memmap costs ten times as much
