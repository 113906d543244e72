"""A block as one op: its ops' results and gradients, bit for bit; whoever watches ops sees them one by one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uvit_fast.kernels.runtime import launch
from uvit_fast.model.uvit import Block

pytestmark = pytest.mark.interpreter
B, L, D, HEADS = 1, 5, 64, 1


def made(concat_skip: bool) -> tuple[Block, list[torch.Tensor]]:
    torch.manual_seed(0)
    block = Block(D, HEADS, 4.0, concat_skip, "auto", "auto")
    for p in block.parameters():
        p.data += 0.02 * torch.randn_like(p)
    if concat_skip:
        block.attn.qkv.requires_grad_(False)  # frozen
        block.skip_linear.requires_grad_(False)
    return block.half(), [torch.randn(B, L, D).half() for _ in range(2 if concat_skip else 1)]


class Watched(TorchDispatchMode):
    """Keeps the names of our ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "uvit_fast":
            self.names.append(func._schema.name.removeprefix("uvit_fast::"))
        return func(*args, **(kwargs or {}))


def step(block, xs, mode=None):
    """Result, sums, and the gradients of the inputs, which a later long skip reads too, and of the weights."""
    xs = [x.clone().requires_grad_() for x in xs]
    with mode or torch.enable_grad():
        y, sums = block(*xs, hand_on=True)
        torch.manual_seed(1)
        results, wanted = [y, 0.3 * xs[0]], [*xs, *(p for p in block.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(results, wanted, [torch.randn_like(y) for _ in results])
    return [y.detach(), sums, *grads]


@pytest.mark.parametrize("concat_skip", [False, True], ids=["without a skip", "with a skip"])
def test_it_is_its_ops_one_after_the_other(concat_skip, monkeypatch):
    block, xs = made(concat_skip)
    wanted = step(block, xs, watched := Watched())
    first = ["skip_linear"] if concat_skip else []
    rest = ["proj_ln_mlp"] if concat_skip else ["linear_residual", "ln_mlp"]
    assert watched.names[: len(first) + 2 + len(rest)] == [*first, "ln_linear", "attention", *rest]
    monkeypatch.setattr(launch, "is_direct", lambda device: True)  # recordings are made here too
    for _ in range(3):
        got = step(block, xs)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.no_grad():
        with Watched():
            wanted = block(*xs)
        assert torch.equal(block(*xs), wanted)


def test_what_an_op_cannot_take_is_called(monkeypatch):
    block, (x,) = made(False)
    from uvit_fast.kernels.ops import block as op

    taken = op._block
    seen = []
    monkeypatch.setattr(op, "_block", lambda *args: seen.append(taken(*args)) or seen[-1])
    with torch.no_grad():
        block(x)
        block.double()(x.double())
        block.half().mlp.fc1.weight = torch.nn.Parameter(torch.randn(4 * D, D).double())
        with pytest.raises(RuntimeError, match="dtype"):  # PyTorch's own words
            block(x)
    assert [s is not None for s in seen] == [True, False, False]
