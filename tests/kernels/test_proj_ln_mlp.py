"""proj_ln_mlp in plain Triton against its reference, what it keeps, and what it refuses."""

import pytest
import torch

from tests.kernels import interpreted
from tests.kernels.interpreted import compare, compiles, in_the_interpreter
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.ops import linear_residual, ln_mlp, proj_ln_mlp

D = 128


def arguments(shape, dtype):
    def random(*shape):
        return torch.randn(*shape).to(dtype)

    a, x, gamma, beta = random(*shape[:-1], 2 * D), random(*shape), 1 + 0.1 * random(D), 0.1 * random(D)
    weight, w1, w2 = (random(n, k) * k**-0.5 for n, k in ((D, 2 * D), (4 * D, D), (D, 4 * D)))
    return [a, weight, random(D), x, gamma, beta, w1, random(4 * D), w2, random(D)]


@in_the_interpreter
@pytest.mark.parametrize(
    "shape, dtype, tolerance", [((1, 257, D), torch.float32, 2e-4), ((3, 43, D), torch.float16, 2e-3)]
)
def test_forward_and_gradients_match_the_reference(shape, dtype, tolerance):
    torch.manual_seed(0)
    compare(proj_ln_mlp.proj_ln_mlp, proj_ln_mlp.reference, arguments(shape, dtype), tolerance)


@in_the_interpreter
def test_it_is_its_two_ops_bit_for_bit_and_keeps_no_more_than_its_inputs_and_four_values_times_d():
    torch.manual_seed(0)
    args = [t.requires_grad_() for t in arguments((1, 65, D), torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = proj_ln_mlp.proj_ln_mlp(*args)
    known = {t.data_ptr() for t in args}
    assert sum(t.numel() for t in kept if t.data_ptr() not in known) <= 4 * 65 * D + 2 * layernorm.TILE
    two = ln_mlp.ln_mlp(linear_residual.linear_residual(*args[:4]), *args[4:])
    assert torch.equal(y, two)
    dy = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, args, dy), torch.autograd.grad(two, args, dy)):
        assert torch.equal(one, other)


@compiles
def test_the_kernels_in_the_interpreter():
    interpreted.run(__file__)


@compiles
def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="proj_ln_mlp: the tensors are on cpu"):
        proj_ln_mlp.proj_ln_mlp(*arguments((1, 3, D), torch.float32))
