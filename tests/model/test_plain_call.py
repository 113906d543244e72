"""model(x, t, y) without gradients is captured once a shape and replayed, whatever happens between two calls; on a
stand-in for graphs.
"""

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.recorded import RecordedGraphs
from uvit_fast import build_model, load_config
from uvit_fast.diffusion.samplers import DPMSolverPPMultistep
from uvit_fast.diffusion.schedules import SDSchedule
from uvit_fast.kernels.ops.fp8_block import REFERENCE
from uvit_fast.model import replayed
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.runtime.device import set_to
from uvit_fast.runtime.hooks import Structure
from uvit_fast.sampling.captured import GraphSampler

TINY = ["embed_dim=64", "depth=2", "num_heads=1", "num_classes=11", "img_size=8", "activation_checkpointing=none"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = build_model(load_config("configs/h2_256.yaml", [f"model.{setting}" for setting in TINY])).eval()
    made.captures.graphs = RecordedGraphs()
    return made


def inputs(batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(batch, 4, 8, 8, generator=g), torch.rand(batch, generator=g) * 999
    return x, t, torch.randint(10, (batch,), generator=g)


@torch.no_grad()
def as_written(net, x, t, y):
    net.cuda_graphs = False
    try:
        return net(x, t, y=y)
    finally:
        del net.cuda_graphs


@torch.no_grad()
def check(net, calls=3, batch=2):
    """Each of a few calls gives what the call as it is written gives; returns how many recordings there were."""
    before = net.captures.graphs.captures
    for seed in range(calls):
        x, t, y = inputs(batch, seed)
        got = net(x, t, y=y)
        assert torch.equal(got, as_written(net, x, t, y)) and got.isfinite().all()
    return net.captures.graphs.captures - before


def test_the_second_call_of_a_shape_captures_and_later_ones_replay(net):
    assert [check(net, batch=batch) for batch in (2, 3, 2, 3)] == [1, 1, 0, 0]
    x, t, y = inputs()
    with torch.no_grad():
        for variant in (x.double(), x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
            wanted = as_written(net, variant, t, y)
            for _ in range(3):
                got = net(variant, t, y)
                assert torch.equal(got, wanted) and got.dtype == wanted.dtype and got.stride() == wanted.stride()
    with torch.autocast("cpu", torch.bfloat16):
        assert check(net) == 1
    assert check(net) == 0


@pytest.mark.parametrize("backend", [torch.backends.cuda.matmul, torch.backends.cudnn.conv], ids=["matmul", "conv"])
def test_tf32_may_be_chosen_by_pytorchs_newer_settings(net, backend):
    """Once they are used, the older ones can no longer be read."""
    assert check(net) == 1
    with set_to(backend, fp32_precision="ieee" if backend.fp32_precision == "tf32" else "tf32"):
        assert check(net) == 1
    assert check(net) == 0


def test_an_output_is_the_callers_own(net):
    check(net)
    with torch.no_grad():
        first = net(*inputs())
        kept = first.clone()
        net(*inputs(seed=1))
        assert torch.equal(first, kept)
        first.add_(1)
        assert torch.equal(net(*inputs()), kept)
    with torch.inference_mode():
        assert net(*inputs()).is_inference()
    assert check(net) == 0  # also after a capture that inference mode used


def test_weights_may_change_in_place_and_may_move(net):
    check(net)
    block = net.blocks[1]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    block.norm2.bias.data.add_(1)
    net.load_state_dict({name: value * 0.9 for name, value in net.state_dict().items()})
    assert check(net) == 0
    moves = [
        lambda: setattr(block.mlp.fc1.weight, "data", block.mlp.fc1.weight.data * 2),
        lambda: setattr(block.attn.proj.weight, "data", block.attn.proj.weight.data.t()),
        lambda: setattr(block.attn, "qkv", nn.Linear(64, 192, bias=False)),
        lambda: setattr(net, "pos_embed", nn.Parameter(torch.randn_like(net.pos_embed))),
        lambda: net.load_state_dict({n: v * 0.9 for n, v in net.state_dict().items()}, assign=True),
        lambda: setattr(block.mlp.fc2, "bias", None),
        lambda: setattr(block.norm1, "eps", 1e-2),
        lambda: setattr(block.attn, "backend", "math"),
        lambda: setattr(net, "kernels", "reference"),
        net.double,
    ]
    for move in moves:
        move()
        assert check(net, calls=4) == 1


def test_a_weight_of_one_value_is_known_by_what_it_is(net):
    """Another of the same value is another: it may change later."""
    net.final_layer = nn.Conv2d(4, 1, 1)
    assert check(net) == 1
    net.final_layer.bias = nn.Parameter(net.final_layer.bias.detach().clone())
    assert check(net) == 1
    with torch.no_grad():
        net.final_layer.bias.add_(1)
    assert check(net) == 0


@pytest.mark.parametrize("name", ["kernels", "decoder_pred.bias"])  # the second is the last of all weights
def test_what_was_deleted_is_missed(net, name):
    check(net)
    owner, _, gone = name.rpartition(".")
    delattr(net.get_submodule(owner), gone)
    with pytest.raises((AttributeError, KeyError), match=gone) as wanted:
        as_written(net, *inputs())
    for _ in range(3):
        with torch.no_grad(), pytest.raises(wanted.type, match=gone):
            net(*inputs())


@pytest.mark.parametrize("array", [torch.zeros, np.zeros])
def test_settings_may_be_arrays(net, array):
    for _ in range(2):
        net.blocks[0].attn.table = array(2)
        assert check(net) == 1


def test_what_decides_nothing_may_change(net, monkeypatch):
    check(net)
    calls, decisive = [], Structure._decisive
    monkeypatch.setattr(Structure, "_decisive", lambda self: calls.append(1) or decisive(self))
    for change in (net.train, net.eval, lambda: net.requires_grad_(False), lambda: net.requires_grad_(True)):
        change()
        assert check(net) == 0
    assert len(calls) == 2  # once after each change of an attribute
    hook = net.blocks[0].mlp.register_full_backward_hook(lambda *_: None)
    hook.remove()
    net.blocks[0].norm1.eps = float("1e-5")  # equal, another object
    assert check(net) == 0


def test_hooks_run_while_they_are_there(net):
    check(net)
    seen, fc1 = [], net.blocks[1].mlp.fc1
    for register in (
        lambda: fc1.register_forward_hook(lambda module, args, out: seen.append(1) or out + 1),
        lambda: fc1.register_forward_pre_hook(lambda module, args: seen.append(1)),
        lambda: net.register_forward_hook(lambda module, args, out: seen.append(1) or out + 1),
        lambda: nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(1)),
    ):
        hook = register()
        assert check(net, calls=4) == 0
        seen.clear()
        as_written(net, *inputs())
        wanted = len(seen)
        torch.no_grad()(net)(*inputs())
        assert len(seen) == 2 * wanted > 0
        hook.remove()
        assert check(net) == 0
    fc1._forward_hooks = OrderedDict({0: lambda module, args, out: out + 1})
    assert check(net, calls=4) == 0
    fc1._forward_hooks.clear()
    assert check(net, calls=8) == 1
    fc1.forward = lambda x, forward=fc1.forward: forward(x) * 2
    assert check(net, calls=8) == 0
    del fc1.forward
    assert check(net, calls=8) == 1
    mlp = net.blocks[0].mlp
    mlp.__class__ = type("Doubling", (type(mlp),), {"forward": lambda self, x: 2 * self.fc1(x)[..., :64]})
    assert check(net, calls=4) == 0


@torch.no_grad()
def test_a_first_call_is_rehearsed_where_only_our_code_runs(net, monkeypatch):
    seen, rehearsed = [], []
    monkeypatch.setattr(replayed.ops, "compile_ahead", lambda device, network, run: rehearsed.append(run()))
    hook = net.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(1))
    net(*inputs(batch=3))
    assert (len(seen), rehearsed) == (1, [])
    hook.remove()
    for _ in range(3):
        net(*inputs(batch=4))
    assert len(rehearsed) == 1


@pytest.mark.parametrize(
    ("kernels", "dtype", "fp8", "rehearsed"),
    [
        ("auto", torch.bfloat16, False, True),
        ("reference", torch.bfloat16, False, False),
        ("reference", torch.bfloat16, True, True),  # whose products have kernels all the same
        ("auto", torch.float64, False, False),  # no fused op takes it
    ],
)
def test_what_pytorch_computes_is_not_rehearsed(kernels, dtype, fp8, rehearsed, monkeypatch):
    """As if on a GPU: the rehearsal would compute it."""
    monkeypatch.setattr("uvit_fast.kernels.runtime.checks.interpreting", lambda: True)
    monkeypatch.setattr("uvit_fast.kernels.runtime.launch.ahead", contextlib.nullcontext)
    settings = [f"model.{setting}" for setting in (*TINY, f"kernels={kernels}")]
    made = build_model(load_config("configs/h2_256.yaml", settings)).to(dtype).eval()
    made, ran = Fp8UViT(made, REFERENCE) if fp8 else made, []
    replayed.ops.compile_ahead(torch.device("cuda"), made, lambda: ran.append(1))
    assert bool(ran) == rehearsed


@pytest.mark.parametrize("how", ["a layer of others", "compiled inside", "a subclass of tensors"])
def test_what_may_run_code_of_others_is_not_captured(net, how):
    assert replayed.capturable(net)
    if how == "a layer of others":
        net.blocks[0].mlp.fc1 = type("Adapter", (nn.Linear,), {})(64, 256)
    elif how == "compiled inside":
        net.blocks[0].compile(backend="eager")
    else:
        net.blocks[0].mlp.fc1.weight = nn.Parameter(torch.zeros(256, 64).as_subclass(type("Own", (torch.Tensor,), {})))
    assert not replayed.capturable(net)


def test_gradients_have_the_call_as_it_is_written(net):
    check(net)
    x, t, y = inputs()
    net(x, t, y=y).sum().backward()
    assert net.pos_embed.grad is not None
    net.requires_grad_(False)
    x.requires_grad_()
    net(x, t, y=y).sum().backward()
    assert x.grad is not None
    recorded = net.captures.graphs.captures
    for _ in range(3):  # nothing wants one: a replay, without no_grad
        out = net(x.detach(), t, y=y)
    assert not out.requires_grad and net.captures.graphs.captures == recorded and len(net.captures) == 1


def test_whoever_records_or_watches_sees_the_operations(net):
    check(net)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    names = []
    with Seen(), torch.no_grad():
        net(*inputs())
    assert any("addmm" in name or "linear" in name for name in names)
    sample, (x, _, y) = GraphSampler(net, graphs=RecordedGraphs()), inputs(seed=3)
    before = net.captures.graphs.captures
    got = sample(DPMSolverPPMultistep(SDSchedule(), 4), x, {"y": y})
    assert sample.graphs.captures == 1 and net.captures.graphs.captures == before and got.isfinite().all()
    x, t, y = inputs()
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager", dynamic=False, fullgraph=True)
        torch.testing.assert_close(compiled(x, t, y), as_written(net, x, t, y))
    with torch.no_grad():
        assert torch.func.grad(lambda x: net(x, t, y).sum())(x).abs().sum() > 0


def test_memory_is_bounded(net, monkeypatch):
    for batch in range(1, 12):
        check(net, batch=batch)
    assert len(net.captures) == replayed.MOST and check(net, batch=11) == 0 and check(net, batch=1) == 1
    net.captures.clear()
    assert len(net.captures) == net.captures.bytes == 0
    monkeypatch.setattr(RecordedGraphs, "budget", lambda self, device: 8 * 5000)
    net.captures.graphs.held = 2000
    for batch in (1, 2, 3, 4):
        check(net, batch=batch)
        assert net.captures.bytes <= 5000
    net.captures.graphs.held = 9000
    check(net, calls=5, batch=5)
    assert net.captures.bytes <= 5000


def test_it_is_off_by_a_switch(net, monkeypatch):
    net.cuda_graphs = False
    with torch.no_grad():
        for _ in range(3):
            net(*inputs())
    net.cuda_graphs = True
    monkeypatch.setenv("UVIT_FAST_CUDA_GRAPHS", "0")
    assert check(net) == 0
    monkeypatch.setenv("UVIT_FAST_CUDA_GRAPHS", "no")
    with pytest.raises(ValueError, match="UVIT_FAST_CUDA_GRAPHS: expected 0 or 1, got 'no'"):
        net(*inputs())


def test_copies_begin_anew_and_nothing_of_it_is_saved(net):
    names = list(net.state_dict())
    check(net)
    assert list(net.state_dict()) == names
    torch.save(net, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert len(other.captures) == 0
        other.captures.graphs = RecordedGraphs()
        with torch.no_grad():
            other.pos_embed.add_(1)
        assert check(other) == 1
    assert check(net) == 0


def test_a_network_is_freed_with_its_last_user(net):
    check(net)
    gone = weakref.ref(net)
    gc.disable()
    try:
        other = copy.deepcopy(net)
        other.captures.graphs = RecordedGraphs()
        check(other)
        gone = weakref.ref(other)
        del other
        assert gone() is None  # without the garbage collector: its memory is a GPU's
    finally:
        gc.enable()


def test_threads_share_a_network(net):
    wanted = [as_written(net, *inputs(batch)) for batch in (1, 2, 3)]
    wrong = []

    @torch.no_grad()
    def work(batch):
        for _ in range(8):
            if not torch.equal(net(*inputs(batch)), wanted[batch - 1]):
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and net.captures.graphs.captures == 3


def test_wrong_input_is_named_as_ever(net):
    check(net)
    x, t, y = inputs()
    with torch.no_grad():
        for _ in range(4):
            with pytest.raises(ValueError, match="t: expected shape"):
                net(x, t[:1], y=y)
            with pytest.raises(ValueError, match="x: expected shape"):
                net([1.0], t, y=y)
