"""Warnings as users meet them: a line each, said once, however many loader processes come to it."""

import mmap
import os
import warnings
import zlib

SLOTS = 1 << 20
_said = mmap.mmap(-1, SLOTS)  # a byte a message, shared with the processes that are forked from this one


def plain() -> None:
    """From here on a warning is the line `warning: ...` on stderr, and what libraries say to programmers is left out."""
    warnings.formatwarning = _line
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    for library in ("PIL", "huggingface_hub", "transformers", "diffusers"):
        warnings.filterwarnings("ignore", module=rf"{library}\b")


def _line(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """What stands for a warning; nothing where it has been said."""
    text = " ".join(str(message).split())
    slot = zlib.crc32(text.encode("utf-8", "replace")) % SLOTS
    if _said[slot]:
        return ""
    _said[slot] = 1
    rank = os.environ.get("RANK", "0")
    return f"warning: {text}\n" if rank == "0" else f"warning of rank {rank}: {text}\n"
