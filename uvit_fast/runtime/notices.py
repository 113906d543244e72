"""Warnings as users see them: one line each, printed once, however many loader processes raise them."""

import mmap
import os
import warnings
import zlib

SLOTS = 1 << 20
_said = mmap.mmap(-1, SLOTS)  # one byte per message, shared with forked processes


def plain() -> None:
    """Print warnings as lines `warning: ...` on stderr from now on, and drop those that libraries address to
    programmers.
    """
    warnings.formatwarning = _line
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    for library in ("PIL", "huggingface_hub", "transformers", "diffusers"):
        warnings.filterwarnings("ignore", module=rf"{library}\b")


def _line(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Return a warning's line; "" if it was printed before."""
    text = " ".join(str(message).split())
    slot = zlib.crc32(text.encode("utf-8", "replace")) % SLOTS
    if _said[slot]:
        return ""
    _said[slot] = 1
    rank = os.environ.get("RANK", "0")
    return f"warning: {text}\n" if rank == "0" else f"warning of rank {rank}: {text}\n"
