"""Cached layers: what reuses is what the plan says, at the price that it promises; refused where it cannot be."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.recorded import RecordedGraphs
from uvit_fast import build_model, build_sampler, load_config
from uvit_fast.config.plans import CachePlan, contracted, expanded, read_plan, write_plan
from uvit_fast.diffusion.caching import LayerCache, layers, outer_plan
from uvit_fast.diffusion.guidance import Guidance
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.model.cached import sublayers
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.sampling.loop import sample

NAMES = sublayers(4)
ALL = frozenset(NAMES)


def network(*overrides):
    cfg = load_config("configs/digits_eps.yaml", ["model.depth=4", "model.embed_dim=64", *overrides])
    return build_model(cfg).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return network()


def inputs(rows=2):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, 8, 8, generator=g), torch.full((rows,), 500.0), torch.arange(rows)


class Products(TorchDispatchMode):
    """Counts the operations of products: torch's own counter hooks every module, which a cache refuses."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_a_cache_that_only_keeps_changes_no_bit_and_what_it_keeps_is_each_sublayers_output(net):
    held, (x, t, y) = {}, inputs()
    branches = {}
    for name in NAMES:
        module = net.get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: branches.update({name: out}))
    net(x, t, y)
    for name in NAMES:
        net.get_submodule(name)._forward_hooks.clear()
    assert torch.equal(net(x, t, y, cache=LayerCache(held, frozenset(), ALL)), net(x, t, y))
    assert held.keys() == ALL
    for name, kept in held.items():
        torch.testing.assert_close(kept, branches[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", ["concat", "add", "none"])
def test_reusing_everything_at_the_same_input_gives_the_same_output(skip):
    net, held, (x, t, y) = network(f"model.skip={skip}"), {}, inputs()
    expected = net(x, t, y, cache=LayerCache(held, frozenset(), ALL))
    torch.testing.assert_close(net(x, t, y, cache=LayerCache(held, ALL, frozenset())), expected, rtol=1e-4, atol=1e-5)


def test_what_is_reused_is_not_computed():
    """By the products' multiply-adds: only the layers outside the blocks and the skips' stay."""
    net, held, arguments = network("model.attention=math"), {}, inputs()
    with Products() as whole:
        net(*arguments, cache=LayerCache(held, frozenset(), ALL))
    with Products() as reused:
        net(*arguments, cache=LayerCache(held, ALL, frozenset()))
    with Products() as half:
        net(*arguments, cache=LayerCache(held, frozenset(n for n in NAMES if n.endswith("mlp")), frozenset()))
    D, L, rows, blocks = 64, 18, 2, 5
    mlps, attentions = 2 * rows * L * blocks * 8 * D**2, 2 * rows * L * blocks * (4 * D**2 + 2 * L * D)
    assert whole.flops - half.flops == mlps
    assert whole.flops - reused.flops == mlps + attentions


def test_branches_reuse_their_own_and_a_branch_without_any_computes():
    g = torch.Generator().manual_seed(0)
    before, after = torch.zeros(4, 3, 2), torch.randn(4, 3, 2, generator=g)
    cache = LayerCache({}, frozenset({"a"}), frozenset())
    assert cache.find("a", 4) is None and cache.wants("a") and not cache.wants("b")
    cache.leave("a", before, after)
    assert torch.equal(cache.find("a", 4), after) and torch.equal(cache.find("a", 2), after[:2])
    assert cache.find("a", 8) is None and cache.find("b", 4) is None


def in_fp8(keep=("in_blocks.0.mlp", "out_blocks.-1")):
    net = network("model.embed_dim=128", "model.num_heads=2").to(torch.bfloat16)
    return Fp8UViT(net, fp8_block.REFERENCE, keep)


@pytest.mark.parametrize("keep", [(), ("in_blocks.0.mlp", "out_blocks.-1"), ("in_blocks.0", "out_blocks.-1")])
def test_in_fp8_keeping_changes_no_bit_and_reusing_at_the_same_input_gives_the_same_output(keep):
    net, held, arguments = in_fp8(keep), {}, inputs()
    whole = net(*arguments)
    assert torch.equal(net(*arguments, cache=LayerCache(held, frozenset(), ALL)), whole)
    assert held.keys() == ALL and all(kept.shape == (2, 18, 128) for kept in held.values())
    before = {name: kept.clone() for name, kept in held.items()}
    attentions = frozenset(n for n in NAMES if n.endswith("attn"))
    for reuse in (ALL, attentions, ALL - attentions):
        again = net(*arguments, cache=LayerCache(held, reuse, frozenset()))
        assert (again - whole).norm() < 0.03 * whole.norm()  # sums of bf16 values, rounded anew to e4m3
    assert all(torch.equal(held[name], kept) for name, kept in before.items())


def test_in_fp8_what_is_reused_is_not_computed():
    net, held, arguments = in_fp8(()), {}, inputs()
    net(*arguments, cache=LayerCache(held, frozenset(), ALL))
    counts = Counter()

    def product(epilogue, *args, **more):
        counts[epilogue, more.get("x2") is not None] += 1
        return fp8_block.REFERENCE.product(epilogue, *args, **more)

    net.by = fp8_block.REFERENCE._replace(product=product)
    net(*arguments, cache=LayerCache(held, ALL - {"mid_block.attn"}, frozenset()))
    assert counts == {("plain", True): 2, ("plain", False): 1, ("residual", False): 1}


@pytest.mark.parametrize(
    ("make", "interval"), [(network, (0.0, 1.0)), (network, (0.2, 0.7)), (in_fp8, (0.2, 0.7))], ids=str
)
def test_a_captured_loop_with_a_plan_is_the_plain_one_bit_for_bit(make, interval):
    """Guided throughout, and from no guidance to guidance and back: replayed with other noise."""
    cfg = load_config(
        "configs/digits_eps.yaml", ["model.embed_dim=64", "sample.cache=outer:2", "sample.sampler=dpmpp_2m"]
    )
    net, sampler, graphs, (_, _, y) = make(), build_sampler(cfg, 8), RecordedGraphs(), inputs()
    assert sum(bool(s.layers and s.layers.reuse) for s in sampler.stages) == 3
    replay = GraphSampler(net, graphs=graphs)
    for seed in range(2):
        x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = sampler(Guidance(net, {"y": y}, {"y": 10}, 0.7, interval), x_T)
        got = replay(sampler, x_T, {"y": y}, {"y": 10}, 0.7, interval)
        assert torch.isfinite(got).all() and torch.equal(got, expected)
    assert graphs.captures == 1
    whole = build_sampler(cfg.model_copy(update={"sample": cfg.sample.model_copy(update={"cache": "none"})}), 8)
    assert not torch.equal(replay(whole, x_T, {"y": y}, {"y": 10}, 0.7, interval), got) and graphs.captures == 2


def test_guided_branches_are_as_if_each_had_run_alone(net):
    """A scale of 0 takes the conditional branch of both: what the unguided loop gives."""
    cfg = load_config("configs/digits_eps.yaml", ["model.embed_dim=64", "sample.cache=outer:3"])
    sampler, (x_T, _, y) = build_sampler(cfg, 7), inputs()
    both = sampler(Guidance(net, {"y": y}, {"y": 10}, 0.0), x_T)
    torch.testing.assert_close(both, sampler(partial(net, y=y), x_T), rtol=1e-4, atol=1e-4)


def test_an_evaluation_keeps_what_the_next_one_reuses():
    a, b, none = frozenset("a"), frozenset("b"), frozenset()
    assert layers((none, none, a, a | b, b, none)) == [None, (none, a), (a, b), (a | b, none), (b, none), None]


def test_outer_plans_are_whole_inside_intervals_and_at_the_end():
    """Multistep: one of three. Order 3: the start alone may reuse, so never two evaluations in a row."""

    def whole(times, begins, every):
        return [not reused for reused in outer_plan(times, begins, "ab", every)]

    times = [0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.01]
    assert whole(times, [True] * 8, 3) == [True, False, False, True, False, False, True, True]
    assert whole(times, [True, False, False, True, False, False, True, True], 3) == [True] * 3 + [False] + [
        True
    ] * 2 + [
        False,
        True,
    ]


def test_plans_are_read_and_written_as_few_patterns(tmp_path):
    reuse = [frozenset(), ALL, frozenset(n for n in NAMES if n.endswith("attn")), frozenset({"in_blocks.0.mlp"})]
    short = {i: contracted(NAMES, each) for i, each in enumerate(reuse) if each}
    assert short == {1: ("*",), 2: ("*.attn",), 3: ("in_blocks.0.mlp",)}
    for name in ("plan.yaml", "plan.json"):
        write_plan(CachePlan(steps=4, sampler="dpm_fast", reuse=short), tmp_path / name)
        assert list(expanded(read_plan(tmp_path / name), NAMES, "plan")) == reuse


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 4", "reuse: missing"),
        ("steps: 4\nreuse: {1: '*'}", r"reuse.1: expected a list in brackets, got '\*'"),
        ("steps: 4\nreuse: {1: [in_blocks.0.atn]}", "no sublayer 'in_blocks.0.atn'; did you mean in_blocks.0.attn"),
        ("steps: 4\nreuse: {4: ['*']}", "expected evaluations from 0 to 3, got 4"),
        ("steps: 4\nreuse: {0: ['*']}", "first evaluation has nothing to reuse"),
        ("steps: 5\nreuse: {1: ['*']}", "a plan of 5 evaluations, got sample.steps 4"),
        ("steps: 4\nsampler: dpmpp_2m\nreuse: {1: ['*']}", "a plan for sample.sampler dpmpp_2m, got dpm_fast"),
        ("- 1", "expected a plan, with steps and reuse"),
        (None, "No such file"),
    ],
)
def test_plans_that_do_not_fit_are_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "plan.yaml").write_text(text)
    cfg = load_config("configs/digits_eps.yaml", [f"sample.cache={tmp_path / 'plan.yaml'}", "sample.steps=4"])
    with pytest.raises(UserError, match=message) as caught:
        build_sampler(cfg)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("unet_adm_256", "sample.steps=50", "a U-Net has no layers that are cached"),
        ("h2_256", "sample.cache=outer:1", "N of at least 2"),
        ("h2_256", "sample.cache=fast", "expected none, outer:N, outer:N:K, or a plan's"),
    ],
)
def test_configs_that_cannot_be_cached_are_one_line(config, override, message):
    with pytest.raises(UserError, match=message):
        load_config(f"configs/{config}.yaml", ["sample.cache=outer:2", override])


def test_networks_that_cannot_be_cached_say_why():
    held, arguments = {}, inputs()
    cache = LayerCache(held, frozenset(), ALL)
    net = network("model.activation_checkpointing=block").requires_grad_(True)
    with pytest.raises(UserError, match="sample.cache: .*activation checkpointing.*; expected none"):
        net(*arguments, cache=cache)
    net.requires_grad_(False).mid_block.mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="sample.cache: mid_block.mlp has hooks.*; expected none"):
        net(*arguments, cache=cache)
    compiled = network()
    compiled.mid_block.compile()
    with pytest.raises(UserError, match="sample.cache: blocks under torch.compile .*; expected none"):
        compiled(*arguments, cache=cache)
    cfg = load_config("configs/digits_eps.yaml", ["sample.cache=outer:2", "sample.steps=4"])
    assert torch.isfinite(next(sample(in_fp8(), cfg, 1, labels=torch.tensor([1])))).all()
    with pytest.raises(UserError, match="expected a UViT as it is, got OptimizedModule"):
        next(sample(torch.compile(network()), cfg, 1, labels=torch.tensor([1])))
    cfg = load_config("configs/digits_eps.yaml", ["sample.cache=outer:2:3"])
    with pytest.raises(UserError, match="at most 2 outer blocks"):
        build_sampler(cfg)
