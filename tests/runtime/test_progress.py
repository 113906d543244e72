"""Bars of work under way."""

import re
import sys
import time
from pathlib import Path

from uvit_fast.runtime.progress import Bar

ROOT = Path(__file__).parent.parent.parent


def work() -> None:
    for _ in Bar(range(3), what="sample", unit="images"):
        time.sleep(0.02)


def test_a_bar_says_units_rate_and_the_time_that_is_left(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar(what="sample", unit="images", total=10, done=4, mininterval=0) as bar:
        time.sleep(0.02)
        bar.update(2)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert re.fullmatch(r"sample:  60%\|.*\| 6/10 images, [ \d.]+ images/s, \d\d:\d\d left\s*", shown), shown


def test_what_is_piped_gets_none(capsys):
    work()
    assert capsys.readouterr() == ("", "")


def test_all_bars_are_these():
    users = {path for path in (ROOT / "uvit_fast").rglob("*.py") if re.search(r"(import|from) tqdm", path.read_text())}
    assert users == {ROOT / "uvit_fast" / "runtime" / "progress.py"}
