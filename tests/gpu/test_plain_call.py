"""model(x, t, y) on a GPU: replayed or not, the same bits, whatever happens to the network between two calls."""

import copy
import threading

import pytest
import torch

from uvit_fast import build_model, load_config
from uvit_fast.diffusion.objective import mse_loss
from uvit_fast.kernels.layernorm import fold, refold
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops.block import one_by_one
from uvit_fast.kernels.runtime import program

pytestmark = pytest.mark.gpu
SMALL = ["model.embed_dim=128", "model.depth=4", "model.num_heads=2", "model.activation_checkpointing=none"]


@pytest.fixture
def net(cores):
    torch.manual_seed(0)
    return build_model(load_config("configs/h2_256.yaml", SMALL)).to("cuda", torch.bfloat16).eval()


def inputs(batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 32, 32, generator=g)
    return x.cuda(), torch.rand(batch, generator=g).cuda() * 999, torch.randint(1000, (batch,), generator=g).cuda()


@torch.no_grad()
def as_written(net, x, t, y):
    net.cuda_graphs = False
    try:
        with program.suspended():
            return net(x, t, y=y)
    finally:
        net.cuda_graphs = True


@torch.no_grad()
def check(net, calls=4, batch=3, seed=0):
    """Each of a few calls gives what the call as it is written gives; returns how many captures there are then."""
    for i in range(calls):
        x, t, y = inputs(batch, seed + i)
        got = net(x, t, y=y)
        assert torch.equal(got, as_written(net, x, t, y)) and got.isfinite().all()
    return len(net.captures)


def test_replays_are_the_call_as_it_is_written(net):
    assert [check(net, batch=batch) for batch in (1, 3, 8, 1)] == [1, 2, 3, 3]
    with torch.inference_mode():
        assert check(net) == 3
    with torch.autocast("cuda", torch.bfloat16):
        assert check(net) == 4
    with torch.no_grad():  # no output is overwritten
        outputs = [(net(*inputs(seed=i)), as_written(net, *inputs(seed=i))) for i in range(4)]
    assert all(torch.equal(got, expected) for got, expected in outputs)


def test_weights_that_change_or_move_are_seen(net):
    check(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
        check(net, 1)
        torch._foreach_mul_([*net.parameters()], 0.99)
        check(net, 1)
        net.blocks[0].norm2.bias.data[5] += 1e-2  # one value, of which no version tells
        check(net, 1)
        net.blocks[1].attn.qkv.weight.data.mul_(0.5)
        check(net, 1)
        net.blocks[1].norm1.weight.data = net.blocks[1].norm1.weight.data * 2
        check(net, 1)
    net.load_state_dict({name: value * 0.9 for name, value in net.state_dict().items()})
    check(net, 1)
    net.load_state_dict({name: value * 0.9 for name, value in net.state_dict().items()}, assign=True)
    check(net)
    held = torch.cuda.memory_allocated()
    net.cpu()
    torch.cuda.empty_cache()
    assert len(net.captures) == 0 and torch.cuda.memory_allocated() < held
    assert check(net.cuda()) == 1


def test_hooks_and_settings_are_seen(net):
    check(net)
    hook = net.blocks[2].mlp.fc1.register_forward_hook(lambda module, args, out: out + 1)
    check(net)
    hook.remove()
    check(net)
    net.kernels = "reference"
    check(net)
    other = copy.deepcopy(net)
    assert len(other.captures) == 0 and check(other) == 1


def test_threads_and_streams_do_not_meet(net):
    wanted = [as_written(net, *inputs(batch, i)) for i, batch in enumerate((1, 2, 3, 4))]
    wrong, together = [], torch.no_grad()(lambda i: net(*inputs(i + 1, i)))

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                if not torch.equal(together(i), wanted[i]):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(net.captures) == 4


def test_a_users_own_capture_and_compilation_hold_the_network_itself(net):
    x, t, y = inputs()
    check(net)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = net(x, t, y=y)
    x.copy_(inputs(seed=5)[0])
    graph.replay()
    assert torch.equal(out, as_written(net, x, t, y))
    with torch.no_grad():
        compiled = torch.compile(net, dynamic=False)
        for i in range(2):
            torch.testing.assert_close(
                compiled(*inputs(seed=i)), as_written(net, *inputs(seed=i)), rtol=0.05, atol=0.05
            )


def test_gradients_are_wanted_or_not(net):
    check(net)
    x, t, y = inputs()
    assert net(x, t, y=y).requires_grad
    net.requires_grad_(False)
    x.requires_grad_()
    assert not torch.no_grad()(net)(x, t, y=y).requires_grad
    assert net(x.detach(), t, y=y).grad_fn is None


@pytest.mark.parametrize("policy", ["none", "block", "selective"])
def test_a_step_by_the_notes_has_the_gradients_of_one_without(cores, policy):
    torch.manual_seed(0)
    cfg = load_config("configs/h2_256.yaml", [*SMALL, f"model.activation_checkpointing={policy}"])
    net = build_model(cfg).to("cuda", torch.bfloat16)
    weights = list(net.parameters())

    def step(i):
        x, t, y = inputs(3, i)
        return torch.autograd.grad(mse_loss(net(x, t, y=y), x), weights)

    for i in range(4):
        got = step(i)
        with program.suspended():
            wanted = step(i)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_block_is_its_ops_one_after_the_other(net):
    x, t, y = inputs()
    weights = [*net.parameters()]

    def step():
        out = net(x, t, y=y)
        return out, torch.autograd.grad(mse_loss(out, x), weights)

    for _ in range(4):
        out, got = step()
        with one_by_one():
            wanted_out, wanted = step()
        assert torch.equal(out, wanted_out) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("D", [512, 768, 1024, 1152])
def test_what_is_folded_again_has_the_bits_of_the_first_fold(cores, D):
    def random(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()

    norm, layers = Norm(random(D), random(D)), (Linear(random(3 * D, D)), Linear(random(4 * D, D), random(4 * D)))
    x, derived = random(258, D), refold.Derived()

    def fold_all():
        return [t for linear, s in zip(layers, (1.0, 0.5)) for t in fold.prepare(x, norm, linear, scale=s).linear]

    with derived.open() as held:
        kept = fold_all()
        again = derived.refresh(held)
    for weight in (None, *norm[:2], *layers[0][:1], *layers[1]):
        if weight is not None:
            weight.data[..., -1].neg_()
        again()
        assert all(torch.equal(a, b) for a, b in zip(kept, fold_all()))
    kept[0].fill_(7)
    again()
    assert (kept[0] == 7).all()


def test_every_op_is_written_down_on_a_gpu(net):
    """Or training would fall back to the slow way without a word."""
    from uvit_fast.kernels.ops import (
        assemble,
        attention,
        block,
        linear_residual,
        ln_linear,
        ln_mlp,
        proj_ln_mlp,
        skip_linear,
    )

    x, t, y = inputs()
    ops = [m._op for m in (attention, linear_residual, ln_linear, ln_mlp, proj_ln_mlp, skip_linear)]
    for _ in range(3):
        with one_by_one():
            mse_loss(net(x, t, y=y), x).backward()
    for _ in range(3):
        mse_loss(net(x, t, y=y), x).backward()
    for op in (*ops, assemble._op, block._block):
        assert not op.programs._never, op.programs._never
        assert any(op.programs._known.values())
        assert not op.backwards._never, op.backwards._never
