"""ln_mlp in plain Triton against its reference, and what it refuses."""

import pytest
import torch

from tests.kernels import interpreted
from tests.kernels.interpreted import compare, compiles, in_the_interpreter
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.ops import ln_mlp

D = 128
# (shape, dtype, tolerance): the paper's 257, 258 and 334 tokens, an odd batch, no multiple of a tile. fp32 is held to the GELU's fit, 2.6e-5 absolute.
CASES = [
    ((1, 257, D), torch.float32, 2e-4),
    ((3, 86, D), torch.float16, 1e-3),
    ((1, 334, D), torch.float32, 2e-4),
]


def arguments(shape, dtype, mean=1.0):
    x, gamma, beta = torch.randn(shape) + mean, 1 + 0.1 * torch.randn(D), 0.1 * torch.randn(D)
    w1, w2 = torch.randn(4 * D, D) * D**-0.5, torch.randn(D, 4 * D) * D**-0.5
    return [t.to(dtype) for t in (x, gamma, beta, w1, torch.randn(4 * D), w2, torch.randn(D))]


@in_the_interpreter
@pytest.mark.parametrize("shape, dtype, tolerance", CASES, ids=str)
def test_forward_and_gradients_match_the_reference(shape, dtype, tolerance):
    torch.manual_seed(0)
    compare(ln_mlp.ln_mlp, ln_mlp.reference, arguments(shape, dtype), tolerance)


@in_the_interpreter
def test_a_large_mean_costs_nothing():
    torch.manual_seed(0)
    compare(ln_mlp.ln_mlp, ln_mlp.reference, arguments((1, 65, D), torch.float32, mean=8.0), 2e-4)


@in_the_interpreter
def test_the_last_backward_frees_what_was_kept_and_no_other_does():
    """Twice with retain_graph, and then once more: the same gradients; the GELU's argument is gone after the third."""
    torch.manual_seed(0)
    leaves, kept = [t.requires_grad_() for t in arguments((1, 65, D), torch.float32)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ln_mlp.ln_mlp(*leaves)
    (h,) = (t for t in kept if t.shape == (65, 4 * D))
    before, dy = h.detach().clone(), torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert torch.equal(h, before)
    for retain in (True, False):
        again = torch.autograd.grad(y, leaves, dy, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert h.untyped_storage().nbytes() == 0


@compiles
def test_the_kernels_in_the_interpreter():
    interpreted.run(__file__)


@compiles
def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="ln_mlp: the tensors are on cpu"):
        ln_mlp.ln_mlp(*arguments((1, 3, D), torch.float32))


@in_the_interpreter
def test_the_backward_keeps_five_values_a_token_and_inference_none():
    torch.manual_seed(0)
    args = arguments((1, 65, D), torch.float32)
    kept = []
    with torch.no_grad():
        assert ln_mlp._forward(*args, 1e-5, False)[2].numel() == 0
    leaves = [t.requires_grad_() for t in args]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ln_mlp.ln_mlp(*leaves)
    parameters = {t.data_ptr() for t in leaves[1:]}
    values = sum(t.numel() for t in kept if t.data_ptr() not in parameters)
    assert values <= 5 * 65 * D + 2 * layernorm.TILE  # x, half the GELU's argument, and the statistics of a tile
