"""Warnings are lines for a user, each said once."""

import subprocess
import sys

SCRIPT = """
import multiprocessing, warnings
from uvit_fast.runtime import notices

def worker(number):
    warnings.warn("a.png is damaged\\n; b.png takes its place")
    warnings.warn(f"worker {number}")

notices.plain()
warnings.warn("the parent's")
warnings.warn("for programmers", FutureWarning)
warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
processes = [multiprocessing.get_context("fork").Process(target=worker, args=(i,)) for i in range(2)]
for process in processes:
    process.start()
    process.join()
"""


def test_loader_processes_say_once_what_they_all_meet():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "warning: the parent's",
        "warning: a.png is damaged ; b.png takes its place",
        "warning: worker 0",
        "warning: worker 1",
    ]
