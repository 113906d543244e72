"""ln_linear's fold, and what it refuses; what it shares with the other ops is in test_ops.py."""

import pytest
import torch

from tests.kernels.op_cases import OPS, arguments, compare
from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops.ln_linear import ln_linear, why_not

D = 128


@pytest.mark.interpreter
@pytest.mark.parametrize("name, allowed", [("ln_linear", 1e-5), ("ln_mlp", 2e-4)])
def test_a_large_mean_costs_nothing(name, allowed):
    torch.manual_seed(0)
    compare(*OPS[name], arguments(name, (1, 65, D), torch.float32, mean=8.0), allowed)


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [256, 320])
@pytest.mark.parametrize("largest", [1.0, 50.0])  # a channel that LayerNorm lets out
def test_folded_weights_sum_up_to_nothing_though_rounded(width, largest):
    """Or the mean of x would multiply what rounding leaves of their sum; and what takes it up costs a few hundredths of
    rounding.
    """
    torch.manual_seed(0)
    x, beta, weight = (torch.randn(*shape).half() for shape in ((1, width), (width,), (512, width)))
    gamma = (1 + 0.1 * torch.randn(width)).half()
    gamma[3] *= largest
    folded = fold.prepare(x, Norm(gamma, beta), Linear(weight)).linear.weight.double()
    exact = gamma.double() * weight.double()
    exact -= exact.mean(1, keepdim=True)
    rounded = exact.half().double()
    assert folded.sum(1).abs().median() < rounded.sum(1).abs().median() / 8
    assert (folded - exact).norm() < 1.1 * (rounded - exact).norm()


@pytest.mark.interpreter
def test_weights_that_stay_are_folded_once():
    x, norm, linear = arguments("ln_linear_bias", (1, 65, D), torch.float16)
    expected, changed = ln_linear(x, norm, linear), Linear(linear.weight.clone(), linear.bias)
    with fold.folded_once():
        assert torch.equal(ln_linear(x, norm, changed), expected)
        changed.weight.zero_()  # nobody may, and so nobody sees it
        assert torch.equal(ln_linear(x, norm, changed), expected)
        assert torch.equal(ln_linear(x, norm, linear), expected)
    assert torch.equal(ln_linear(x, norm, Linear(changed.weight)), torch.zeros_like(expected))


@pytest.mark.interpreter
def test_why_not_names_what_does_not_fit():
    x, norm, linear = arguments("ln_linear_bias", (1, 3, D), torch.float16)
    assert why_not(x, norm, linear) is None
    assert "norm.weight has the shape (127,), not (128,)" in why_not(x, Norm(norm.weight[1:], norm.bias), linear)
    assert "no multiple of 64" in why_not(x[..., 1:], norm, linear)
    assert "norm.bias is torch.float32" in why_not(x, Norm(norm.weight, norm.bias.float()), linear)
    assert "dtype is torch.float64" in why_not(x.double(), norm, linear)
    assert "is empty" in why_not(x[:0], norm, linear)
    assert "no multiple of 8" in why_not(x, norm, Linear(linear.weight[:-1], linear.bias[:-1]))
