"""Errors that a user can correct."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """An error that the user can correct: commands print its message on one line and exit with code 2."""


class RankError(UserError):
    """A UserError that may occur on a single rank of a job, which then reports it; others occur on all."""


def words(error: Exception) -> str:
    """Return what to print of a UserError, a missing package, or a file that cannot be used."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        named = [str(name) for name in (error.filename2, error.filename) if name]  # of two the first is the target
        if isinstance(error, FileExistsError) and any(map(os.path.isdir, named[:1])):
            return f"{named[0]}: expected a new name, got a folder that is there"
        paths = (path for name in named for path in (name, *map(str, Path(name).parents)))
        if file := next((path for path in paths if os.path.exists(path) and not os.path.isdir(path)), None):
            return f"{file}: expected a folder, got a file"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """End the program, as the commands do, in one line and with exit code 2 where a user can correct the error."""
    try:
        yield
    except (UserError, ImportError, OSError) as error:
        print(f"{sys.argv[0]}: {words(error)}", file=sys.stderr)
        raise SystemExit(2) from None
