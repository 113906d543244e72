"""The sampling benchmark measures what it says, and says what it extrapolates."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import autoencoders, bench_sampling, models, precompile
from benchmarks.bench_sampling import Bench, Case
from benchmarks.common import Rows, select
from benchmarks.results import Results
from tests.recorded import RecordedGraphs

TINY = ["model.embed_dim=64", "model.num_heads=1", "model.depth=2"]
PROVIDERS = ["ours", "ours-fp8", "ours-uncaptured", *models.PEERS]
EVERY = [
    Case(*c) for c in itertools.product([*"SMLH", "USiT"], (1, 8, 16, 50, 500), (False, True), (False, True), PROVIDERS)
]


@pytest.fixture
def bench(monkeypatch):
    """On the CPU, with a small autoencoder, and every run taking a second; the calls of the network are counted."""

    def measure(run, repeats, warmup):
        run()
        return [1000.0]

    monkeypatch.setattr(bench_sampling, "measure", measure)
    monkeypatch.setattr(bench_sampling, "FEW", 1)
    small = {
        "kl": lambda device: autoencoders.kl(device, (32, 32)),
        "dc": lambda device: autoencoders.dc(device, (32,) * 6),
    }
    monkeypatch.setattr(bench_sampling, "AUTOENCODERS", small)
    return lambda *arguments: Bench(torch.device("cpu"), *arguments, graphs=RecordedGraphs())  # fmt: skip


def test_the_essential_cases_hold_the_aims_and_their_peers():
    cases = select(bench_sampling.PRESETS["essential"], EVERY)
    for size, guided, provider in itertools.product("SMLH", (False, True), ("ours", "compiled")):
        assert Case(size, 500, guided, False, provider) in cases
    assert {c.provider for c in cases if c.batch == 1} == {"ours", "ours-uncaptured", "compiled-graphs"}
    assert cases[0] == Case("H", 500, False, False, "ours") and len(cases) == len(set(cases)) == 19


def test_every_size_and_batch_has_its_peers_and_the_most_telling_come_first():
    cases = select(bench_sampling.PRESETS["peers"], EVERY)
    order = [(500, False), (1, False), (50, False), (8, False), (500, True), (1, True), (16, False)]  # batch, guided
    loops, alone = ("eager", "compiled", "torchao-fp8"), ("compiled-graphs", "eager", "compiled")
    runs = [(who, *call) for who in ("ours", "ours-fp8") for call in order]
    runs += [(who, *call) for call in order for who in (alone if call[0] < 50 else loops[:-1] if call[1] else loops)]
    found = [
        (*call, [c.decoded for c in same]) for call, same in itertools.groupby(cases[:-16], lambda c: c[:3] + c[4:])
    ]
    decoded = {500: [False, True], 1: [False, True]}  # the others are measured as latents only
    assert found == [
        (size, batch, guided, who, decoded.get(batch, [False])) for size in "HSLM" for who, batch, guided in runs
    ]
    for size, batch in itertools.product("SMLH", (500, 50, 8, 1)):
        few = {"compiled-graphs"} if batch <= models.MOST_IN_GRAPHS else set()
        wanted = {"ours", "ours-fp8", "eager", "compiled", "torchao-fp8"} | few
        assert {c.provider for c in cases if c[:4] == (size, batch, False, False)} == wanted
    assert {c.provider for c in cases if c.batch == 500} == {"ours", "ours-fp8", "eager", "compiled", "torchao-fp8"}
    assert [c for c in cases if c.guided and c.provider == "torchao-fp8"] == cases[-16:-8]


def test_each_network_is_made_once():
    for preset in ("usit", "peers"):
        cases = select(bench_sampling.PRESETS[preset], EVERY)
        made = [network for network, _ in itertools.groupby(cases, key=lambda case: case.network)]
        assert len(made) == len(set(made))
    assert made[:2] == [("H", "ours", 0), ("H", "ours-fp8", 0)]  # all batches, with and without guidance and decoding
    assert Case("H", 1, True, False, "eager").network != Case("H", 1, False, False, "eager").network
    assert Case("H", 1, False, False, "ours-uncaptured").network == made[0]


def test_what_the_cases_need_is_compiled_before():
    """But for float8 of a few images, which comes last and may be left out."""
    jobs = precompile.jobs("SMLH", ["sampling"])
    there = {job[:3] for job in jobs}
    for case in select(bench_sampling.PRESETS["peers"], EVERY):
        batch = case.batch * (2 if case.guided else 1)
        compiled = case.provider != "eager" and (case.provider != "torchao-fp8" or batch >= 50)
        assert ((case.size, case.provider, batch) in there) == compiled
    assert len(there) == len(jobs) and ("H", "torchao-fp8", 1000) in there
    first = ("torchao-fp8",) * 12 + ("compiled-graphs",) * 16
    assert tuple(job.provider for job in jobs[:28]) == first and {job.batch for job in jobs[:4]} == {1000}


def test_of_what_the_cases_need_some_can_be_compiled_alone(monkeypatch, capsys):
    monkeypatch.setattr(precompile, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(precompile, "compile_one", lambda job, device, overrides: 0.0)
    monkeypatch.setattr(precompile, "forget_choices", lambda: 0)
    command = ["precompile", "--device", "cpu", "--workers", "1", "--what", "sampling", "--sizes", "S"]
    monkeypatch.setattr(sys, "argv", [*command, "--providers", "compiled-graphs"])
    precompile.main()
    said = {line.split("] ")[1] for line in capsys.readouterr().out.splitlines()[:-1]}
    assert said == {f"S, {n} images, compiled-graphs, sampling: 0 s" for n in (16, 8, 2, 1)}


@pytest.mark.parametrize(
    ("case", "evaluations", "expected"),
    [
        (Case("S", 2, False, False, "ours"), None, (250, 50)),  # a loop of 50 in a second; 250 loops are 500 samples
        (Case("S", 2, True, False, "eager"), None, (2500, 5)),  # 5 evaluations in a second
        (Case("S", 1, False, False, "eager"), 10, (2500, 10)),
        (Case("S", 2, False, True, "eager"), None, (2750, 5)),  # and a second of decoding, which is not scaled to 50
        (Case("S", 1, False, True, "ours"), 2, (12500, 2)),  # where decoding is in the loop
        (Case("USiT", 2, True, True, "eager"), None, (2750, 5)),  # with its own sampler and autoencoder
    ],
)
def test_what_did_not_run_is_scaled_and_counted(bench, case, evaluations, expected):
    small = ["model.img_size=2", *TINY] if case.size == "USiT" else TINY  # 64 pixels
    times, peak, count = bench(evaluations, small).run(case)
    assert (times[0], count) == (pytest.approx(expected[0]), expected[1]) and len(times) == bench_sampling.MOST


def test_a_decoding_that_networks_share_counts_its_own_memory_only(bench, monkeypatch):
    """Bytes in use before a loop, before the decoding, before the second loop; and at the peaks of the three."""
    used, peaks = iter([10, 12, 100]), iter([20, 42, 110])
    monkeypatch.setattr(bench_sampling, "allocated", lambda device: next(used))
    monkeypatch.setattr(bench_sampling, "peak_of", lambda device: next(peaks))
    measuring = bench(1, TINY)
    assert measuring.run(Case("S", 2, False, True, "eager"))[1] == 10 + 30
    assert measuring.run(Case("M", 2, False, True, "eager"))[1] == 100 + 30


def test_a_network_that_is_not_the_published_one_is_not_timed(bench, monkeypatch):
    measuring, case = bench(2, TINY), Case("S", 2, False, False, "eager")
    measuring.published = ("S", models.Agreement(models.config("S", "eager", overrides=TINY), measuring.device))
    monkeypatch.setattr(
        models.PublishedBlock, "compute", lambda self, x, skip, sums: (x + self.attn(self.norm1(x)), None)
    )
    with pytest.raises(RuntimeError, match="eager: eps is .* from the published network's in fp32, expected"):
        measuring.run(case)


def test_a_loop_that_is_not_captured_is_not_called_so():
    with pytest.warns(RuntimeWarning, match="uncaptured"), pytest.raises(RuntimeError, match="could not be captured"):
        Bench(torch.device("cpu"), 2, TINY).run(Case("S", 1, False, False, "ours"))


def test_tables_say_what_is_extrapolated(tmp_path):
    """Of the times that they show: not of another case, another provider, or what another device measured before."""
    case, shown = "H:500:nocfg:latent", [("H:500:nocfg:latent", who) for who in ("ours", "eager", "compiled")]
    assert Results(tmp_path).extrapolated(shown) == ""
    rows = Rows("sampling", tmp_path)

    def add(case, provider, count):
        common = {"dtype": "bf16", "batch": int(case.split(":")[1])}
        rows.add(case, provider, [1.0], metric="time", unit="s_per_500", **common)
        rows.add(case, provider, [count], metric="nfe_measured", unit="of_50", **common)

    rows.common |= {"device": "older", "date": "2026-01-01"}
    add(case, "ours", 5.0)
    rows.common |= {"device": "newer", "date": "2026-01-02"}
    for name, provider, count in (
        (case, "ours", 50.0), (case, "eager", 5.0), (case, "compiled", 5.0), (case, "ours-uncaptured", 5.0),
        ("S:500:nocfg:latent", "ours", 50.0), ("S:500:nocfg:latent", "eager", 50.0), ("H:500:cfg:latent", "ours", 5.0),
    ):  # fmt: skip
        add(name, provider, count)
    rows.write()
    found = Results(tmp_path)
    assert found.extrapolated(shown) == (
        "Scaled from fewer than the 50 evaluations: batch 500 from 5 (eager, compiled)."
    )
    assert found.extrapolated(shown[:1]) == ""
    others = [("S:500:nocfg:latent", "eager"), ("H:500:cfg:latent", "ours")]
    assert found.extrapolated([*shown, *others]).endswith(
        "batch 500 from 5 (eager of H, compiled); batch 500 guided from 5 (ours)."
    )
