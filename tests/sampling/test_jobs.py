"""Sampling jobs that are killed, and two of them in one place."""

import os
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training import tiny
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.jobs import Job
from uvit_fast.sampling.output import save_npz, save_pngs

TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def draw(first: int, last: int) -> np.ndarray:
    return np.stack([np.random.default_rng(i).integers(0, 256, (8, 8, 1), np.uint8) for i in range(first, last)])


def work(out: Path) -> None:
    job = Job(out, {"seed": 0}, 30, 4, resume=True)
    job.run(draw)
    if out.suffix:
        job.collect(lambda file: save_npz(file, job.images(), 30, np.arange(30)))
    else:
        save_pngs(out, job.images(), None)
    job.close()


def in_a_copy(task, *args) -> int:
    """How a copy of this process ended, which has no threads."""
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # bars
        try:
            task(*args)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(touch: int, out: Path) -> None:
    """Work until the folder is about to be touched for the n-th time."""
    seen = 0

    def count(event: str, args: tuple) -> None:
        nonlocal seen
        if event in TOUCHES and str(args[0]).startswith(str(out.parent)):
            seen += 1
            if seen == touch:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work(out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out.iterdir() if out.is_dir() else [out])}


def killed_again_and_again(folder: Path, name: str) -> list[tuple[bool, list[str]]]:
    """Of each job that came through twenty kills: whether it drew what one does that nobody disturbs,
    and what it left.
    """
    rng, kills, whole, out, ends = random.Random(0), 0, folder / "whole" / name, folder / name, []
    whole.parent.mkdir()
    in_a_copy(work, whole)
    while kills < 20 or not ends:
        kills += in_a_copy(killed_at, rng.randrange(3, 115), out) == signal.SIGKILL
        if out.exists() and not (folder / f"{name}.parts").exists():
            ends.append((contents(out) == contents(whole), sorted(path.name for path in folder.iterdir())))
            out.rename(folder / "whole" / f"{len(ends)}")
    return ends


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_a_job_that_is_killed_again_and_again_draws_what_an_undisturbed_one_does(name, tmp_path):
    """At random touches of the disk, between which nothing can change on it; nothing is left over."""
    for same, left in tiny.launch(killed_again_and_again, tmp_path, name):
        assert same and left == [name, "whole"]


def second(out: Path) -> tuple[int, list[str]]:
    """The process that has the job, and what others are told of it, with and without --resume."""
    (holding, up), (go_on, done) = os.pipe(), os.pipe()

    def holds_it() -> None:
        job = Job(out, {}, 4, 2, resume=False)
        os.write(up, b"!")
        os.read(go_on, 1)
        job.run(draw)

    if (child := os.fork()) == 0:
        try:
            holds_it()
        finally:
            os._exit(0)
    os.read(holding, 1)
    told = []
    for resume in (False, True):
        try:
            Job(out, {}, 4, 2, resume)
        except UserError as error:
            told.append(str(error))
    os.write(done, b"!")
    os.waitpid(child, 0)
    return child, told


def test_a_second_job_in_one_place_is_told_who_has_it(tmp_path):
    child, told = tiny.launch(second, tmp_path / "out")
    words = rf"out: another job writes it, pid {child} on .*, since 20.*; expected another --out"
    assert len(told) == 2 and all(re.search(words, line) for line in told), told
    assert Job(tmp_path / "out", {}, 4, 2, resume=True).run(draw)


@pytest.mark.parametrize("note", ["", "[1]", "7"])
def test_a_note_that_is_none_is_one_line(note, tmp_path):
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "job.json").write_text(note)
    with pytest.raises(UserError, match="job.json: damaged; expected the settings"):
        Job(tmp_path / "out", {}, 4, 2, resume=True)
