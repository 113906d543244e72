"""Few tokens: which program has which steps of K, what the table chooses, and counters that outlive no capture."""

import json
import re

import pytest
import torch

from uvit_fast.kernels.gemm import sm90, sm90_fp8
from uvit_fast.kernels.layernorm.fold import new_statistics
from uvit_fast.kernels.layernorm.sums import WIDEST
from uvit_fast.kernels.layers import Quantised
from uvit_fast.kernels.quantise import E4M3
from uvit_fast.kernels.runtime import launch, once, program, tuning

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tiles", "steps", "programs"), [(36, 72, 108), (45, 72, 132), (117, 36, 132), (5, 3, 15)])
def test_as_many_programs_share_a_tile_as_have_steps_of_it(tiles, steps, programs):
    owner = [0] * (tiles * steps)  # of each step, tile after tile
    for p in range(programs):
        for step in range(p * tiles * steps // programs, (p + 1) * tiles * steps // programs):
            owner[step] = p
    most = max(len({*owner[t * steps : (t + 1) * steps]}) for t in range(tiles))
    assert sm90.sharers(tiles, steps, programs) in (most, most + 1)
    assert all(a <= b <= a + 1 for a, b in zip(owner, owner[1:]))


def test_tokens_between_those_measured_take_the_choice_for_a_few_more(monkeypatch):
    table = {"few:8x4:100": {"tokens": 64}, "few:8x4:200": {"tokens": 128}, "few:8x4:1000": {"tokens": 256}}
    monkeypatch.setattr(tuning, "table", lambda arch: table)
    found = {
        tokens: tuning.few(CPU, "few", 8, 4, tokens).get("tokens") for tokens in (60, 70, 100, 101, 150, 201, 700, 1001)
    }
    assert found == {60: None, 70: 64, 100: 64, 101: None, 150: 128, 201: None, 700: 256, 1001: None}
    assert tuning.few(CPU, "few", 7, 4, 100) == {} and tuning.few(CPU, "fp8_few", 8, 4, 100) == {}


def test_an_e4m3_product_of_few_tokens_takes_its_own_choice_or_a_rule(monkeypatch):
    chosen, pairs = {"tokens": 64, "stages": 6, "part": 32, "halves": True}, {"tokens": 128, "part": 32, "pairs": 2}
    entries = {"few:384x128:258": {"tokens": 32}, "fp8_few:384x128:258": chosen | {"sums": True, "early": 4}}
    monkeypatch.setattr(tuning, "table", lambda arch: {"default": {}, "fp8_gemm": pairs} | entries)
    monkeypatch.setattr(launch, "run", lambda *launched: None)
    for module in (sm90, sm90_fp8):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    found, layer = [], Quantised(torch.zeros(384, 128, dtype=E4M3), torch.zeros(2, 384))
    monkeypatch.setattr(sm90_fp8, "arguments", lambda asked, **tile: found.append(tile) or ((), {}, 1, None))
    x = torch.zeros(33024, 128, dtype=E4M3)
    with once.stretch({}):
        for M in (258, 200, 300, 33024):
            sm90_fp8.product("plain", x[:M], layer)
    waits, early = {"early": 0}, {"early": 4}  # a weight may be being written at its first use
    wanted = [chosen | waits, chosen | early, sm90.FEW, pairs]
    assert found == [tile | {"at_once": 132} for tile in wanted]
    assert [sm90_fp8.takes_sums(x[:M], layer) for M in (258, 200, 300)] == [True, True, False]


@pytest.mark.parametrize("case, features", [("few", 64), ("fp8_few", 128)])
def test_choices_of_the_table_are_arguments_that_fit(case, features):
    """Tiles and stages fit shared memory, shares have a step each. `features`: of a step of K, in 128 bytes."""
    table = json.loads(tuning.path(90).read_text())
    sizes = (re.fullmatch(rf"{case}:(\d+)x(\d+):(\d+)", key) for key in table)
    entries = [(*map(int, size.groups()), table[size.string]) for size in sizes if size]
    assert entries
    for N, K, M, chosen in entries:
        tokens, tail = chosen.get("tokens", sm90.TOKENS), chosen.get("tail", 0)
        tiles, halves = -(-N // 128) * -(-M // (tokens + tail)), chosen.get("halves", False)
        assert sm90.sharers(tiles, K // features, min(tiles * chosen.get("shares", 1), 132)) <= 6
        stage = (128 + tokens * (1 + halves) + tail) * 128
        staging = 2 * min(tokens // (1 + halves), chosen.get("staging", sm90.STAGING)) * 128 + 2 * tail * 128
        staging *= chosen.get("pairs", 1)
        used = chosen.get("stages", sm90.STAGES.get(tokens)) * stage + staging
        assert used < 226 * 1024, (N, K, M)  # of 227 KB, one for barriers
        assert tokens + tail <= WIDEST
        assert chosen.get("early", 0) in (0, 4, 8), "early says how many steps of weights are asked for"


def test_statistics_have_room_for_the_last_tile():
    """Whatever its tokens: of three or six images of 334 tokens, too, which take the choice for 258's."""
    for M in (*range(1, 700), 1002, 2004, 33024):
        stats = new_statistics(torch.empty(M, 8), M)
        assert stats.stride(0) % 16 == 0  # as the kernels are compiled
        assert all(-(-M // span) * span <= stats.stride(0) for span in range(32, WIDEST + 1, 8))


def test_weights_are_known_to_a_stretch_from_their_second_use_on():
    """At the first the kernel before may be writing them; in a stretch that keeps nothing it may be at each."""
    a, b = torch.empty(2), torch.empty(2)
    assert not once.met(a) and not once.met(a)
    with once.stretch({}):
        assert [once.met(t) for t in (a, b, a.view(1, 2), b)] == [False, False, True, True]
        assert not any(once.met(a + b) for _ in range(4))  # cast at each call, say, and freed
        with once.stretch(None):
            assert not once.met(a)
    with once.stretch({}):
        assert not once.met(a)


def test_counters_are_the_streams_or_a_stretchs_and_notes_ask_for_them_anew(monkeypatch):
    monkeypatch.setattr(launch, "is_direct", lambda device: True)

    def op(x):
        counters = once.counters(x.device, 3)
        out = x.new_empty(x.shape)
        return out.copy_(x + counters[:3])

    programs, x = program.Programs(op), torch.ones(3)
    outs = [programs(x) for _ in range(4)]
    assert all(torch.equal(out, x) for out in outs) and all(programs._known.values())
    assert once.counters(CPU, 3) is once.counters(CPU, 3)
    with once.stretch(None):
        assert once.kept() is None
        own = once.counters(CPU, 3)
        own[0] = 5  # what notes read is what is there now
        assert programs(x)[0] == 6
        assert once.counters(CPU, 5000) is not own
    assert programs(x)[0] == 1
