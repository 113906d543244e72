"""A sampling job that can be interrupted and spread over processes: one part on disk per batch, until all are there.

Sample i depends on the seed and i only, so it does not matter who draws a part, or when. No process holds more than one
part.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from uvit_fast.runtime.claims import LOCK, Claim, Taken
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole
from uvit_fast.runtime.processes import ALONE, World
from uvit_fast.runtime.progress import Bar
from uvit_fast.runtime.text import shown


class Job:
    """`num` samples in parts of `batch`, in the folder `<out>.parts`, which is removed at the end.

    Args:
        out: where the samples go once all are there, a file or a folder.
        settings: JSON values that decide what is drawn; a job only continues with the same ones.
        resume: continue with the parts of an interrupted job.
        world: its processes share the parts; rank 0 collects them.

    Raises:
        UserError: another process runs the job; `out` holds something else than this job's; there are parts of an
            interrupted job and `resume` is off, or they have other settings.
    """

    def __init__(self, out: Path, settings: dict, num: int, batch: int, resume: bool, world: World = ALONE):
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        self._note = self.folder / "job.json"
        self.num, self.batch, self.world = num, batch, world
        self.parts = [(first, min(first + batch, num)) for first in range(0, num, batch)]
        self._claim: Claim | None = None  # rank 0's, on the folder
        told: tuple[str | None, list[tuple[int, int]]] = None, []
        if world.rank == 0:
            refusal = self._prepare({**settings, "batch": batch}, resume)
            told = refusal, [part for part in self.parts if not self._is_whole(part)]
        refusal, self._missing = world.tell(told)
        if refusal is not None:
            raise UserError(refusal)

    def run(self, draw: Callable[[int, int], np.ndarray]) -> bool:
        """Draw this process's share of the missing parts.

        Args:
            draw: draw(first, last) -> samples first ... last - 1, (last - first, H, W, C) uint8.

        Returns:
            Whether this process collects, in which case all parts are there: rank 0.
        """
        mine = self.world.share(self._missing)
        done = self.num - sum(last - first for first, last in self._missing)
        with (
            self._removed_if_empty(),
            Bar(what="sample", unit="images", total=self.num, done=done, quiet=self.world.rank > 0) as bar,
        ):
            for part in mine:
                write_whole(self._file(part), partial(np.save, arr=draw(*part)))
                bar.update(min((part[1] - part[0]) * self.world.size, self.num - bar.n))  # the others keep pace
                self.world.check()
        return self.world.gather(None) is not None

    def images(self) -> Iterator[np.ndarray]:
        """Yield all samples in order, a part at a time: (B, H, W, C) uint8."""
        for part in self.parts:
            yield np.load(self._file(part))

    def close(self) -> None:
        """Remove the parts, once the samples are where they belong."""
        for path in self.folder.iterdir():
            if path not in (self._note, self.folder / LOCK):
                path.unlink()
        self._note.unlink()  # after the others: until here the job can continue
        shutil.rmtree(self.folder)
        assert self._claim is not None
        self._claim.release()

    def collect(self, write: Callable[[Path], object]) -> None:
        """Write the file `out` by `write(temporary)`, whole or not at all; a killed job's temporary is removed with the
        parts.
        """
        temporary = self.folder / self.out.name
        write(temporary)
        temporary.rename(self.out)

    @contextlib.contextmanager
    def _removed_if_empty(self) -> Iterator[None]:
        """Remove the folder of a job that ends before its first part: there is nothing with which to continue."""
        try:
            yield
        except BaseException:
            alone = self.world.size == 1  # else another process may be writing its first part
            if self._claim is not None and alone and not any(self._file(part).exists() for part in self.parts):
                shutil.rmtree(self.folder, ignore_errors=True)
                self._claim.release()
            raise

    def _prepare(self, settings: dict, resume: bool) -> str | None:
        """Create the folder and keep other jobs out of it, or return why it cannot be used."""
        empty = not self.folder.exists() or all(path.name == LOCK for path in self.folder.iterdir())
        try:
            self._claim = Claim(self.folder)
            refusal = self._refusal(settings, resume)
            if refusal is None:
                write_whole(self._note, lambda file: file.write_text(json.dumps(settings)))
                for left_over in self.folder.glob(f".*_{self.out.name}"):  # of a job killed while collecting
                    left_over.unlink()
        except Taken as taken:
            return f"{self.out}: another job writes it, {taken}; expected another --out"
        except OSError as error:
            if empty:
                shutil.rmtree(self.folder, ignore_errors=True)
            return f"{self.out}: expected a place that can be written to ({error.strerror or error})"
        if refusal is not None:
            self._claim.release()
            if empty:
                shutil.rmtree(self.folder)
        return refusal

    def _refusal(self, settings: dict, resume: bool) -> str | None:
        """Return why the job cannot begin or continue with what is there."""
        if not self._note.is_file():
            if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
                return (
                    f"{self.out}: there already, finished or of something else; expected a new name or an empty folder"
                )
            return None
        if not resume:
            return f"{self.folder}: an interrupted job; continue it with --resume, or remove the folder"
        try:
            before = dict(json.loads(self._note.read_text("utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return f"{self._note}: damaged; expected the settings of an interrupted job, or no such folder"
        for name, value in settings.items():
            if before.get(name) != value:
                return f"{self.folder}: --resume expected {name} {shown(before.get(name))}, got {shown(value)}"
        return None

    def _is_whole(self, part: tuple[int, int]) -> bool:
        """Return whether a part is there with all its samples; a truncated one is drawn again."""
        try:
            images = np.load(self._file(part), mmap_mode="r")
            return images.dtype == np.uint8 and images.ndim == 4 and len(images) == part[1] - part[0]
        except (OSError, ValueError, EOFError):
            return False

    def _file(self, part: tuple[int, int]) -> Path:
        return self.folder / f"{part[0]:07d}_{part[1]:07d}.npy"
