"""Keep folded weights while the weights may change: compare them each time, and fold again those that changed.

No counter reports every write (`.data`, another library's kernel, a replayed graph), so the weights' bits are read:
half the bytes of a fold, and none written. For every GROUP rows, with their norm and bias, two sums of 32-bit words
times pseudo-random numbers are kept, 64 bits each; a change that leaves both has a chance of one in 2^64.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.runtime import launch, once, program, tuning
from uvit_fast.kernels.runtime.launch import cdiv

GROUP = 32  # rows that are compared together
FIELDS = 10  # per layer in the table
_LOOK = {"BLOCK": 512, "AHEAD": 4, "num_warps": 4}


@triton.jit
def _chance(at, SEED: tl.constexpr):
    """Return an odd, well mixed number for each position (the finaliser of MurmurHash3)."""
    h = (at + SEED).to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return (h ^ (h >> 16)) | 1


@triton.jit
def _times(words, keys):
    """Return the full products of 32-bit numbers."""
    return words.to(tl.uint32, bitcast=True).to(tl.uint64) * keys.to(tl.uint64)


@triton.jit
def _add(sums, words, count, SEED: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Return both sums, BLOCK values each, with `count` 32-bit words added."""
    sums1, sums2 = sums
    at = tl.arange(0, BLOCK)
    keys1, keys2 = _chance(at, SEED), _chance(at, SEED + BLOCK)
    for first in range(0, count, AHEAD * BLOCK):
        found = ()
        for i in tl.static_range(AHEAD):  # all loads are issued before the first is used
            place = first + i * BLOCK + at
            found = found + (tl.load(words + place, mask=place < count, other=0),)
        for i in tl.static_range(AHEAD):
            sums1 += _times(found[i], keys1)
            sums2 += _times(found[i], keys2)
            keys1 *= 0x915F77F5
            keys2 *= 0xD1342543
    return sums1, sums2


@triton.jit
def _place(layer, field: tl.constexpr, base, aligned: tl.constexpr):
    """Return a pointer from the table: its offset in values from `base`, a multiple of `aligned`."""
    return base + tl.multiple_of(tl.load(layer + field), aligned)


@triton.jit
def _words(layer, field: tl.constexpr, base, PER: tl.constexpr):
    """Return a pointer to 32-bit words of PER values each."""
    return base + tl.multiple_of(tl.load(layer + field) // PER, 4)


@triton.jit
def _look_kernel(
    table,  # (layers, FIELDS) int64: see `_row`
    words,  # int32, the base of weights, gamma and beta
    biases,  # the same memory in the weights' dtype
    marks,  # (2,) int64, the base of marks: the sums of the folded weights, and the current ones
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,  # of a row
    PER: tl.constexpr,  # values in a word
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    layer = table + tl.program_id(1) * FIELDS
    N = tl.load(layer + 7).to(tl.int32)
    first = tl.program_id(0) * GROUP
    if first < N:
        at = tl.arange(0, BLOCK)
        there = (at < tl.minimum(GROUP, N - first)) & (tl.load(layer + 8) != 0)
        bias = tl.load(_place(layer, 3, biases, 1) + first + at, mask=there, other=0.0)
        bias = bias.to(tl.float32).to(tl.int32, bitcast=True)
        sums = _times(bias, _chance(at, 0)), _times(bias, _chance(at, BLOCK))
        sums = _add(sums, _words(layer, 1, words, PER), WORDS, 2 * BLOCK, BLOCK, 1)  # gamma
        sums = _add(sums, _words(layer, 2, words, PER), WORDS, 4 * BLOCK, BLOCK, 1)  # beta
        weight = _words(layer, 0, words, PER) + first.to(tl.int64) * WORDS
        sums = _add(sums, weight, tl.minimum(GROUP, N - first) * WORDS, 6 * BLOCK, BLOCK, AHEAD)
        mark = _place(layer, 6, marks, 1) + tl.program_id(0) * 4
        tl.store(mark + 2, tl.sum(sums[0].to(tl.int64, bitcast=True)))
        tl.store(mark + 3, tl.sum(sums[1].to(tl.int64, bitcast=True)))


@triton.jit
def _refold_kernel(
    table,  # (layers, FIELDS) int64
    values,  # the base of weights, gamma, beta, bias and folded weights
    offsets,  # fp32, the base of folded biases
    marks,  # as `_look_kernel` left them
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    ROWS: tl.constexpr,  # folded at a time
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    layer = table + tl.program_id(1) * FIELDS
    N = tl.load(layer + 7).to(tl.int32)
    first = tl.program_id(0) * GROUP
    if first < N:
        mark = _place(layer, 6, marks, 1) + tl.program_id(0) * 4
        sum1, sum2 = tl.load(mark + 2), tl.load(mark + 3)
        if (sum1 != tl.load(mark)) | (sum2 != tl.load(mark + 1)):
            cols = fold.ranges(LO, HI)
            norm = _place(layer, 1, values, 8), _place(layer, 2, values, 8)
            of = (_place(layer, 0, values, 8), norm[0], norm[1], _place(layer, 3, values, 1))
            results = _place(layer, 4, values, 8), _place(layer, 5, offsets, 4)
            scale = tl.load(layer + 9).to(tl.int32).to(tl.float32, bitcast=True)
            has_bias = tl.load(layer + 8) != 0
            for i in range(0, GROUP, ROWS):
                row = first + i + tl.arange(0, ROWS)
                fold.fold_rows(of, results, row, cols, N, scale, D, has_bias)
            tl.store(mark, sum1)
            tl.store(mark + 1, sum2)


class Derived:
    """What products use in place of weights, for recordings of launches that read it and never overlap."""

    def __init__(self) -> None:
        self._kept: dict[tuple, fold.Kept] = {}
        self._marks: dict[tuple, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for key, kept in self._kept.items() for t in (*kept.folded, self._marks[key]))

    def follows(self, weights: Iterable[Tensor]) -> bool:
        """Return whether everything was derived from these tensors' memory, not from a copy that an op made."""
        there = {w.data_ptr() for w in weights}
        sources = [t.data_ptr() for kept in self._kept.values() for t in kept.layer if t is not None]
        return all(at in there and at % 16 == 0 for at in sources)

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[tuple, Any]]:
        """Fold a weight that was never folded here, otherwise use it as it was folded, while open.

        Yields what a recording made meanwhile must hold.
        """
        held: dict[tuple, Any] = dict(self._kept)
        with program.suspended(), once.stretch(held):
            yield held

    def refresh(self, held: dict[tuple, Any]) -> Callable[[], None]:
        """Return a function that folds again everything held whose weights have changed: one launch per width."""
        kinds: dict[tuple, list[tuple]] = {}
        for key, kept in held.items():
            if isinstance(kept, fold.Kept):
                if key not in self._kept:
                    groups = cdiv(len(kept.folded.weight), GROUP)
                    self._marks[key] = kept.folded.weight.new_full((groups, 4), -1, dtype=torch.int64)
                    self._kept[key] = kept
                kinds.setdefault((kept.folded.weight.shape[1], kept.folded.weight.dtype), []).append(key)
        return partial(_each, [self._launches(keys) for keys in kinds.values()])

    def _launches(self, keys: list[tuple]) -> Callable[[], None]:
        layers = [self._kept[key] for key in keys]
        values, offsets = layers[0].folded
        marks, device, D = self._marks[keys[0]], values.device, values.shape[1]
        rows = [_row(kept, self._marks[key], (values, offsets, marks)) for key, kept in zip(keys, layers)]
        table = torch.tensor(rows, dtype=torch.int64, device=device)  # (layers, FIELDS)
        grid = cdiv(max(len(kept.folded.weight) for kept in layers), GROUP), len(rows)
        look = (table, values.view(torch.int32), values, marks)
        again = (table, values, offsets, marks)

        def run() -> None:
            launch.run(device, _look_kernel, grid, look, look_options(D, values.itemsize))
            launch.run(device, _refold_kernel, grid, again, options(D, tuning.choice(device, "prepare", D)))

        return run


def look_options(D: int, itemsize: int) -> dict:
    """Return the constants of `_look_kernel` for weights of D values per row."""
    return {"GROUP": GROUP, "WORDS": D * itemsize // 4, "PER": 4 // itemsize, "FIELDS": FIELDS, **_LOOK}


def options(D: int, tuned: dict) -> dict:
    """Return the constants of `_refold_kernel`, whose bits are `fold.prepare`'s: the same tiles, nothing contracted."""
    rows = {"ROWS": tuned["rows"], "GROUP": GROUP, "FIELDS": FIELDS}
    return {**fold.split(D), **rows, "num_warps": tuned["warps"], "enable_fp_fusion": False}


def _each(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _row(kept: fold.Kept, marks: Tensor, bases: tuple[Tensor, Tensor, Tensor]) -> list[int]:
    """Return a layer's row of the table.

    Offsets in values from `bases` of weight, gamma, beta, bias, folded weight and bias, and marks; rows; whether there
    is a bias; the bits of the scale, an fp32.
    """
    gamma, beta, weight, bias = kept.layer
    values, offsets, first = bases
    places = [(t, values) for t in (weight, gamma, beta, values if bias is None else bias, kept.folded.weight)]
    places += [(kept.folded.bias, offsets), (marks, first)]
    row = [(t.data_ptr() - base.data_ptr()) // base.itemsize for t, base in places]
    return [*row, len(weight), bias is not None, int(torch.tensor(kept.scale).view(torch.int32))]
