"""What ln_mlp and proj_ln_mlp keep for their backward; what they share with the other ops is in test_ops.py."""

import pytest
import torch

from tests.kernels.op_cases import arguments, tensors
from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.ops.linear_residual import linear_residual
from uvit_fast.kernels.ops.ln_mlp import _forward, ln_mlp
from uvit_fast.kernels.ops.proj_ln_mlp import proj_ln_mlp

D = 128
STATISTICS = fold.new_statistics(torch.empty(65, D), 65).numel()  # of 65 tokens


def keeping(op, args):
    """The result, and what the op keeps for its backward beside its arguments."""
    kept, known = [], {t.data_ptr() for t in tensors(args)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = op(*args)
    return y, [t for t in kept if t.data_ptr() not in known]


@pytest.mark.interpreter
def test_the_last_backward_frees_what_was_kept_and_no_other_does():
    """Twice with retain_graph, and then once more: the same gradients; the GELU's argument is gone after the third."""
    torch.manual_seed(0)
    args = arguments("ln_mlp", (1, 65, D), torch.float32, grad=True)
    y, kept = keeping(ln_mlp, args)
    (h,) = (t for t in kept if t.shape == (65, 4 * D))
    before, dy, leaves = h.detach().clone(), torch.randn_like(y), tensors(args)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert torch.equal(h, before)
    for retain in (True, False):
        again = torch.autograd.grad(y, leaves, dy, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert h.untyped_storage().nbytes() == 0


@pytest.mark.interpreter
def test_the_backward_keeps_four_values_a_token_beside_x_and_inference_none():
    torch.manual_seed(0)
    with torch.no_grad():
        assert _forward(*arguments("ln_mlp", (1, 65, D), torch.float32), None, False)[3].numel() == 0
    _, kept = keeping(ln_mlp, arguments("ln_mlp", (1, 65, D), torch.float32, grad=True))
    assert sum(t.numel() for t in kept) <= 4 * 65 * D + STATISTICS  # half the GELU's argument, statistics


@pytest.mark.interpreter
def test_with_the_projection_it_is_the_two_ops_bit_for_bit_and_keeps_no_more():
    torch.manual_seed(0)
    args = arguments("proj_ln_mlp", (1, 65, D), torch.float32, grad=True)
    y, kept = keeping(proj_ln_mlp, args)
    assert sum(t.numel() for t in kept) <= 4 * 65 * D + STATISTICS
    middle, sums = linear_residual(*args[:3])
    two, _ = ln_mlp(middle, *args[3:], sums)
    assert torch.equal(y, two)
    dy = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, tensors(args), dy), torch.autograd.grad(two, tensors(args), dy)):
        assert torch.equal(one, other)
