"""ln_linear in plain Triton against its reference, and what it refuses."""

import pytest
import torch

from tests.kernels import interpreted
from tests.kernels.interpreted import compare, compiles, in_the_interpreter
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.ops import ln_linear

D = 128
# (shape, dtype, tolerance): the paper's 257, 258 and 334 tokens, an odd batch, no multiple of a tile. fp32 shows the algebra.
CASES = [
    ((1, 257, D), torch.float32, 2e-6),
    ((3, 86, D), torch.float16, 1e-3),
    ((1, 334, D), torch.float32, 2e-6),
]


def arguments(shape, dtype, mean=1.0, bias=False):
    x, gamma, beta = torch.randn(shape) + mean, 1 + 0.1 * torch.randn(D), 0.1 * torch.randn(D)
    made = [x, gamma, beta, torch.randn(3 * D, D) * D**-0.5, torch.randn(3 * D) if bias else None]
    return [None if t is None else t.to(dtype) for t in made]


@in_the_interpreter
@pytest.mark.parametrize("shape, dtype, tolerance", CASES, ids=str)
def test_forward_and_gradients_match_the_reference(shape, dtype, tolerance):
    torch.manual_seed(0)
    compare(ln_linear.ln_linear, ln_linear.reference, arguments(shape, dtype), tolerance)


@in_the_interpreter
def test_with_a_bias():
    torch.manual_seed(0)
    compare(ln_linear.ln_linear, ln_linear.reference, arguments((1, 65, D), torch.float32, bias=True), 2e-6)


@in_the_interpreter
def test_a_large_mean_costs_nothing():
    torch.manual_seed(0)
    compare(ln_linear.ln_linear, ln_linear.reference, arguments((1, 65, D), torch.float32, mean=8.0), 1e-5)


@in_the_interpreter
@pytest.mark.parametrize("width", [256, 320])
@pytest.mark.parametrize("largest", [1.0, 50.0])  # a channel that LayerNorm lets out
def test_folded_weights_sum_up_to_nothing_though_rounded(width, largest):
    """Or the mean of x would multiply what rounding leaves of their sum; and what takes it up costs a few hundredths of rounding."""
    torch.manual_seed(0)
    x, beta, weight = (torch.randn(*shape).half() for shape in ((1, width), (width,), (512, width)))
    gamma = (1 + 0.1 * torch.randn(width)).half()
    gamma[3] *= largest
    folded = layernorm.prepare(x, gamma, beta, weight, None, 1e-5)[1].double()
    exact = gamma.double() * weight.double()
    exact -= exact.mean(1, keepdim=True)
    rounded = exact.half().double()
    assert folded.sum(1).abs().median() < rounded.sum(1).abs().median() / 8
    assert (folded - exact).norm() < 1.1 * (rounded - exact).norm()


@in_the_interpreter
def test_weights_that_stay_are_folded_once():
    x, gamma, beta, weight, bias = arguments((1, 65, D), torch.float16, bias=True)
    expected, changed = ln_linear.ln_linear(x, gamma, beta, weight, bias), weight.clone()
    with layernorm.folded_once():
        assert torch.equal(ln_linear.ln_linear(x, gamma, beta, changed, bias), expected)
        changed.zero_()  # nobody may, and so nobody sees it
        assert torch.equal(ln_linear.ln_linear(x, gamma, beta, changed, bias), expected)
        assert torch.equal(ln_linear.ln_linear(x, gamma, beta, weight, bias), expected)
    assert torch.equal(ln_linear.ln_linear(x, gamma, beta, changed, None), torch.zeros_like(expected))


@compiles
def test_the_kernels_in_the_interpreter():
    interpreted.run(__file__)


@compiles
def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="ln_linear: the tensors are on cpu"):
        ln_linear.ln_linear(*arguments((1, 3, D), torch.float32))


@in_the_interpreter
def test_why_not_names_what_does_not_fit():
    x, gamma, beta, weight, _ = arguments((1, 3, D), torch.float16)
    assert ln_linear.why_not(x, gamma, beta, weight) is None
    assert "gamma has the shape" in ln_linear.why_not(x, gamma[1:], beta, weight)
    assert "no multiple of 64" in ln_linear.why_not(x[..., 1:], gamma, beta, weight)
    assert "beta is torch.float32" in ln_linear.why_not(x, gamma, beta.float(), weight)
    assert "dtype is torch.float64" in ln_linear.why_not(x.double(), gamma, beta, weight)
    assert "is empty" in ln_linear.why_not(x[:0], gamma, beta, weight)
    assert "no multiple of 8" in ln_linear.why_not(x, gamma, beta, weight[:-1])


@in_the_interpreter
def test_under_torch_compile_it_is_one_graph():
    torch.manual_seed(0)
    x, gamma, beta, weight, _ = arguments((1, 65, D), torch.float32)
    expected = ln_linear.ln_linear(x, gamma, beta, weight)
    compiled = torch.compile(ln_linear.ln_linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, gamma, beta, weight), expected)
