"""Ops done from notes: the same results from new tensors, and notes of nothing that they cannot say."""

import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.kernels.op_cases import OPS, arguments, result, tensors
from uvit_fast.kernels.runtime import launch, program, recorder


@pytest.fixture
def anywhere(monkeypatch):
    """Notes are taken on a CPU too."""
    monkeypatch.setattr(launch, "is_direct", lambda device: True)


def several_ops(x, w, last):
    """What ops do beside launches: new memory, views of it, results in a slice, several at once, in place, freed
    arguments.
    """
    wide = x.new_empty(x.shape[0], 2 * w.shape[0])
    torch.mm(x, w.t(), out=wide[:, : w.shape[0]])
    left, right = (x.flatten() * 2).split(x.numel() // 2)
    wide[:, w.shape[0] :].copy_(left.sum() + right.view(-1, 1)[:1].mean())
    wide.mul_(0.5)
    if last:
        program.free(w)
    flat = x.new_empty(wide.numel() // 2, 2)
    flat.copy_(wide.view(-1, 2))
    return flat.view(wide.shape), wide[:, 1:], x.new_empty(0)


@pytest.mark.parametrize("last", [False, True])
def test_from_the_third_call_on_notes_are_followed(anywhere, last):
    programs, kept = program.Programs(several_ops), []
    for i in range(5):
        torch.manual_seed(i)
        x, w = torch.randn(4, 6), torch.randn(3, 6)
        expected = several_ops(x, w.clone(), last)
        kept.append((programs(x, w, last), expected))
        assert (w.untyped_storage().nbytes() == 0) == last
    for got, expected in kept:  # no call writes over another's results
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    (noted,) = programs._known.values()
    assert noted is not None and not programs._never


def test_whatever_an_op_depends_on_has_notes_of_its_own(anywhere):
    programs, x, w = program.Programs(several_ops), torch.randn(4, 6), torch.randn(3, 6)
    odd = torch.randn(25)[1:].view(4, 6)  # on another boundary
    for other in (x, x.double(), odd, x.t().contiguous().t(), x[:2]):
        weight = w.to(other.dtype)
        for _ in range(3):
            got = programs(other, weight, False)
            assert all(torch.equal(a, b) for a, b in zip(got, several_ops(other, weight, False), strict=True))
    assert len(programs._known) == 5 and all(programs._known.values())


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, y: x * float(y.sum()), "_local_scalar_dense"),
        (lambda x, y: x + ELSEWHERE, "elsewhere"),
        (lambda x, y: (x * 2).view(torch.int32) + 1, "another dtype"),
    ],
    ids=["reads a value", "a tensor from elsewhere", "a view of other bits"],
)
def test_what_notes_cannot_say_runs_as_it_is_written(anywhere, function, why):
    programs = program.Programs(function)
    for _ in range(4):
        x, y = torch.randn(3, 4), torch.randn(3, 4)
        assert torch.equal(programs(x, y), function(x, y))
    assert why in next(iter(programs._never.values()))


ELSEWHERE = torch.ones(4)


def test_arguments_that_share_memory_leave_no_notes_but_follow_them(anywhere):
    def add(x, y):
        return x * 2 + y

    programs, x = program.Programs(add), torch.randn(5)
    for _ in range(3):
        assert torch.equal(programs(x, x), add(x, x))
    assert not any(programs._known.values()) and not programs._never
    programs(x, torch.randn(5))
    assert all(programs._known.values()) and torch.equal(programs(x, x), add(x, x))


class Launcher:
    """Triton's own, in the form of 3.6 or 3.8: a function around the one that launches, which takes numbers."""

    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, newer: bool, launched: Callable[[tuple], None]):
        if newer:
            self.arg_annotations, self.kernel_signature = "annotations", "signature"

        def around(launcher):
            return lambda *args: launcher(*args)

        self.launch = around(lambda *args: launched(args))


@pytest.mark.parametrize("newer", [False, True])
def test_a_launch_gets_the_numbers_that_tritons_own_would_hand_on(monkeypatch, newer):
    """Grid, stream, function, flags; pointers in their places; a map for each address,
    and shape and strides after it.
    """
    made, seen, tensor = [], [], torch.zeros(8, 64, dtype=torch.bfloat16)

    def make(arg, meta, *_):
        made.append((arg.base.data_ptr(), meta))
        return [f"map {len(made)}", *arg.shape, *arg.strides]

    monkeypatch.setattr(launch, "make_tensordesc_arg", make)
    monkeypatch.setattr(launch, "_known_maps", {})
    metadata = SimpleNamespace(tensordesc_meta=[{"swizzle": 3}])
    compiled = SimpleNamespace(
        run=Launcher(newer, seen.append), metadata=metadata, function=77, packed_metadata="packed"
    )
    direct = launch.Direct(compiled, (9, 2, 1))
    values = [launch.descriptor(tensor, 4, 64), tensor, 5, 0.5, None, True]
    args = direct.call(direct.arguments(values, lambda t: (0, 16)))
    made_by = program.Program(recorder.Recording([(recorder.Call(direct.launch, args, {}), [])], 1, None, {}))
    monkeypatch.setattr(launch, "stream", lambda device: 42)
    for address in (1024, 2048, 1024):
        made_by.run((SimpleNamespace(data_ptr=lambda address=address: address),), tensor.device)
    arguments = ["map 1", 8, 64, 64, 1, 1040, 5, 0.5, None, True]
    if newer:
        middle = ("packed", None, None, None, None, None, "annotations", "signature", arguments)
    else:
        middle = (None, None, "packed", None, None, None, *arguments)
    assert seen[0] == seen[2] == (9, 2, 1, 42, 77, False, True, *middle)
    assert made == [(1040, {"swizzle": 3}), (2064, {"swizzle": 3})] and "map 2" in str(seen[1])


def test_what_only_launches_use_shares_one_allocation(anywhere, monkeypatch):
    """Results are right although temporaries take each other's place, and nobody's that is still read."""

    def add(out, a, b, count):
        out, a, b = (np.ctypeslib.as_array((ctypes.c_float * count).from_address(at)) for at in (out, a, b))
        np.add(a, b, out=out)

    launcher = Launcher(False, lambda args: add(*args[-4:]))
    compiled = SimpleNamespace(run=launcher, metadata=None, function=77, packed_metadata="packed")

    def sum_of(a, b):
        out = a.new_empty(a.numel())
        add(*(t.data_ptr() for t in (out, a, b)), a.numel())
        if launch.listener.here is not None:
            launch.listener.here.launched(launch.Direct(compiled, (1, 1, 1)), [out, a, b, a.numel()])
        return out

    def several(x, y):
        first = sum_of(x, y)
        second = sum_of(first, x)
        x.new_empty(3)  # used by nobody
        third = sum_of(second, second)
        del second
        fourth = sum_of(third, y)
        return sum_of(fourth, first) * 2, sum_of(third, fourth)

    made, empty = [], torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *args, **how: made.append(args) or empty(*args, **how))
    programs = program.Programs(several)
    for _ in range(5):
        x, y = torch.randn(300), torch.randn(300)
        wanted, _ = several(x, y), made.clear()
        assert all(torch.equal(a, b) for a, b in zip(programs(x, y), wanted, strict=True))
    # room for three temporaries, all that are needed at once, on boundaries of 512 bytes; what others read
    assert [shape[0] for shape, _ in made] == [2 * 1536 + 1200, 300, 300]


def test_notes_hold_no_tensor_that_they_were_taken_of(anywhere):
    """Neither a program nor a launch by descriptors: an op's memory would stay as long as the process."""
    programs, (x, w) = program.Programs(several_ops), (torch.randn(4, 6), torch.randn(3, 6))
    seen = [weakref.ref(t) for t in (x, w)]
    for _ in range(2):
        seen += [weakref.ref(t) for t in programs(x, w, False)]
    tensor = torch.zeros(8, 64, dtype=torch.bfloat16)
    metadata = SimpleNamespace(tensordesc_meta=[{}])
    compiled = SimpleNamespace(run=Launcher(True, print), metadata=metadata, function=77, packed_metadata="packed")
    direct = launch.Direct(compiled, (1, 1, 1))
    args = direct.arguments([launch.descriptor(tensor, 4, 64), tensor], lambda t: (0, 0))
    seen.append(weakref.ref(tensor))
    del x, w, tensor
    gc.collect()
    assert args and [*programs._known.values()][0] is not None
    assert not any(reference() is not None for reference in seen)


@pytest.mark.interpreter
def test_an_op_by_its_notes_is_the_op():
    """Kernels and cuBLAS's products, there and back."""

    def run(args):
        y = result(OPS["ln_linear"][0](*args))
        return [y, *torch.autograd.grad(y, tensors(args), torch.ones_like(y))]

    for i in range(3):
        args = arguments("ln_linear", (1, 9, 64), torch.float32, grad=True)
        got = run(args)
        if i == 2:
            with program.suspended():
                expected = run(args)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_notes_are_taken_without_importing_torchs_compiler():
    """It takes seconds, before a process's first image."""
    script = "import sys, torch\nfrom uvit_fast.kernels.runtime import launch, program\n"
    script += "launch.is_direct = lambda device: True\ndouble = program.Programs(lambda x: torch.add(x, x))\n"
    script += "for _ in range(3): double(torch.ones(3))\nassert all(double._known.values())\n"
    script += "assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
