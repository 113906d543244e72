"""Launching: a kernel is compiled once for what it specialises on, and then called with every argument in its place."""

from types import SimpleNamespace

import pytest
import torch

from uvit_fast.kernels.runtime import launch

CPU = torch.device("cpu")


class Kernel:
    """Stands in for a kernel (x, n, SIZE): counts what it compiles and remembers what ran."""

    params = [SimpleNamespace(name=n, is_constexpr=n.isupper()) for n in ("x", "n", "SIZE", "FLAG")]

    def __init__(self):
        self.compiled, self.ran = 0, []

    def __getitem__(self, grid):
        def compile_and_run(x, n, SIZE, FLAG, **options):
            self.compiled += 1
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
