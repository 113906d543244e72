"""Launching: a kernel is compiled once for what it specialises on, and then called with every argument in its place."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from uvit_fast.kernels.runtime import compiling, launch

CPU = torch.device("cpu")


class Kernel:
    """Stands in for a kernel (x, n, SIZE): counts what it compiles and remembers what ran."""

    params = [SimpleNamespace(name=n, is_constexpr=n.isupper()) for n in ("x", "n", "SIZE", "FLAG")]

    def __init__(self, seconds=0.0):
        self.compiled, self.ran, self.seconds = 0, [], seconds

    def __getitem__(self, grid):
        def compile_and_run(x, n, SIZE, FLAG, **options):
            self.compiled += 1
            time.sleep(self.seconds)
            self.ran.append((grid, (x, n, SIZE, FLAG)))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *values: self.kernel.ran.append((grid, values))


def run(kernel, x, n, size=8, flag=True, warps=4):
    launch.run(CPU, kernel, (3,), (x, n, size), {"FLAG": flag, "num_warps": warps})


def test_the_same_kinds_of_arguments_are_compiled_once():
    kernel, x = Kernel(), torch.zeros(64)
    run(kernel, x, 5)
    run(kernel, torch.ones(3), 7)
    assert kernel.compiled == 1
    (_, first), (grid, second) = kernel.ran
    assert grid == (3, 1, 1) and first[1:] == (5, 8, True) and second[1:] == (7, 8, True)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"x": torch.zeros(64)[1:]},  # no longer on a 16-byte boundary
        {"n": 16},  # divisible by 16
        {"n": 1},
        {"n": 2**31},  # no longer 32 bits
        {"size": 16},
        {"flag": False},
        {"warps": 8},
    ],
    ids=str,
)
def test_whatever_triton_specialises_on_is_compiled_anew(other):
    kernel = Kernel()
    run(kernel, torch.zeros(64), 5)
    run(kernel, **{"x": torch.zeros(64), "n": 5} | other)
    assert kernel.compiled == 2


def test_a_user_is_told_what_takes_long(monkeypatch, capsys):
    """One line where a kernel is being compiled, one now and then after that, none where it is found."""
    monkeypatch.setattr(compiling, "_told", compiling._Told())
    monkeypatch.setattr(compiling, "AFTER", 0.05)
    x, kernels = torch.zeros(64), [Kernel(seconds) for seconds in (0, 0, 0.2, 0.2, 0.2, 0, 0)]
    run(kernels[0], x, 5)
    run(kernels[1], x, 5)
    assert capsys.readouterr().err == ""
    for kernel in kernels[2:5]:
        run(kernel, x, 5)
    line = f"uvit-fast: compiling GPU kernels for about a minute, once: they are kept in {knobs.cache.dir}\n"
    assert capsys.readouterr().err == line
    monkeypatch.setattr(compiling, "EVERY", 0.0)
    run(kernels[5], x, 5)
    assert re.fullmatch(r"uvit-fast: compiling GPU kernels: 4 are done after \d+ s\n", capsys.readouterr().err)
    monkeypatch.setenv("RANK", "1")
    run(kernels[6], x, 5)
    assert capsys.readouterr().err == ""
