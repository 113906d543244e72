"""Claim a folder for one process at a time, with a note in it that says which."""

import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import TextIO

LOCK = ".lock"


class Taken(Exception):
    """Another process has claimed the folder. The message names it: "pid 4242 on node-a, since 2026-11-28 18:55:01"."""


class Claim:
    """This process's exclusive claim on a folder. The system releases it when the process ends, however it ends.

    Raises:
        Taken: another process has claimed it. OSError: it is not a writable folder.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            self._file = open(folder / LOCK, "a+")
            # a lock file that was renamed or removed meanwhile, with its folder, excludes nobody
            if _lock(self._file, fcntl.LOCK_EX) and _is_named(self._file, folder / LOCK):
                break
            holder = _read(self._file)
            self._file.close()
            if last:
                raise Taken(holder)
            time.sleep(0.5)  # another process may just have looked
        self._file.truncate(0)
        self._file.write(
            json.dumps({"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        )
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def holder(folder: Path) -> str | None:
    """Return which other process has claimed a folder, in `Taken`'s words, or None. Looking changes nothing."""
    try:
        with open(folder / LOCK) as file:
            return None if _lock(file, fcntl.LOCK_SH) else _read(file)
    except OSError:  # never claimed, or not readable for us
        return None


def _lock(file: TextIO, how: int) -> bool:
    """Return whether nobody else holds the lock; on a file system without locks, True."""
    try:
        fcntl.lockf(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_named(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _read(file: TextIO) -> str:
    try:
        file.seek(0)
        note = json.loads(file.read())
        return f"pid {note['pid']} on {note['host']}, since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or an older version wrote it
        return "which left no note"
