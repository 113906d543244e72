"""Launching: a kernel is compiled once for what it specialises on, and then called with every argument in its place."""

import re
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime._async_compile import active_mode

from uvit_fast.kernels.runtime import compiling, launch
from uvit_fast.kernels.tools import aot

CPU = torch.device("cpu")


class Kernel:
    """Stands in for a kernel (x, n, SIZE): counts what it compiles and remembers what ran."""

    params = [SimpleNamespace(name=n, is_constexpr=n.isupper()) for n in ("x", "n", "SIZE", "FLAG")]

    def __init__(self, seconds=0.0):
        self.compiled, self.ran, self.ahead, self.seconds = 0, [], [], seconds

    def __getitem__(self, grid):
        def compile_and_run(x, n, SIZE, FLAG, **options):
            self.compiled += 1
            time.sleep(self.seconds)
            self.ran.append((grid, (x, n, SIZE, FLAG)))
            return Compiled(self)

        return compile_and_run

    def warmup(self, *args, grid, **options):
        self.ahead.append((grid, args))


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


def test_ahead_everything_is_compiled_and_nothing_launched():
    known, new, x = Kernel(), Kernel(), torch.zeros(64)
    run(known, x, 5)
    with launch.ahead():
        run(known, x, 5)
        run(new, x, 5)
        other = threading.Thread(target=run, args=(known, x, 6))  # launches as ever
        other.start()
        other.join()
    assert (len(known.ran), new.ran) == (2, []) and [grid for grid, _ in known.ahead + new.ahead] == [(3,)] * 2
    with pytest.raises(ZeroDivisionError), launch.ahead():
        raise ZeroDivisionError
    run(new, x, 5)
    assert (new.compiled, len(new.ran)) == (1, 1)


def test_what_another_thread_is_compiling_is_waited_for():
    """Triton's cache, which all threads share, has a future until then."""
    kernel, future, x = Kernel(), Future(), torch.zeros(64)
    now = kernel[(3,)]
    kernel.__class__ = type("Shared", (Kernel,), {"__getitem__": lambda self, grid: later})

    def later(*args, **options):
        future.set_result(now(*args, **options))
        return triton.FutureKernel(lambda found: None, future)

    run(kernel, x, 5)
    run(kernel, x, 7)
    assert kernel.compiled == 1 and len(kernel.ran) == 2


def test_an_error_meanwhile_does_not_wait_for_what_is_left(monkeypatch):
    monkeypatch.setattr(launch, "THREADS", 1)
    began, asked = time.monotonic(), []
    with pytest.raises(ZeroDivisionError), launch.ahead():
        mode = active_mode.get()
        asked += [mode.submit(i, lambda: time.sleep(0.2), lambda found: None) for i in range(20)]
        raise ZeroDivisionError
    assert time.monotonic() - began < 2 and asked[-1].future.cancelled()


@triton.jit
def doubled(x, N: tl.constexpr):
    at = x + tl.arange(0, N)
    tl.store(at, 2 * tl.load(at))


@triton.jit
def refused(x, N: tl.constexpr):
    tl.static_assert(N < 0)


def test_what_is_compiled_at_once_is_found_later_and_what_cannot_be_says_so_then(monkeypatch):
    x = torch.zeros(64)
    with aot.target(90):
        with launch.ahead():
            for kernel in (doubled, refused, doubled):
                launch.run(CPU, kernel, (1,), (x,), {"N": 64})
        monkeypatch.setattr(doubled, "compile", None)
        assert isinstance(doubled.warmup(x, 64, grid=(1,)), triton.compiler.CompiledKernel)
        with pytest.raises(triton.CompilationError):
            _ = refused.warmup(x, 64, grid=(1,)).metadata


def test_a_user_is_told_what_takes_long(monkeypatch, capsys):
    """One line where a kernel is being compiled, one now and then after that, none where it is found."""
    monkeypatch.setattr(compiling, "_told", compiling._Told())
    monkeypatch.setattr(compiling, "AFTER", 0.05)
    x, kernels = torch.zeros(64), [Kernel(seconds) for seconds in (0, 0, 0.2, 0.2, 0.2, 0, 0.2, 0.2)]
    run(kernels[0], x, 5)
    run(kernels[1], x, 5)
    assert capsys.readouterr().err == ""
    for kernel in kernels[2:5]:
        run(kernel, x, 5)
    line = f"uvit-fast: compiling GPU kernels for up to a minute, once: they are kept in {knobs.cache.dir}\n"
    assert capsys.readouterr().err == line
    monkeypatch.setattr(compiling, "EVERY", 0.0)
    run(kernels[5], x, 5)
    assert capsys.readouterr().err == ""
    run(kernels[6], x, 5)
    assert re.fullmatch(r"uvit-fast: compiling GPU kernels: 4 are done after \d+ s\n", capsys.readouterr().err)
    monkeypatch.setenv("RANK", "1")
    run(kernels[7], x, 5)
    assert capsys.readouterr().err == ""
