"""What an op leaves of its result for the LayerNorm that follows: as good as a pass over it, taken once, and never stale."""

import pytest
import torch

from tests.kernels import interpreted
from tests.kernels.interpreted import compiles, in_the_interpreter
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.ops import linear_residual, ln_linear, ln_mlp, proj_ln_mlp, skip_linear

D, SHAPE = 128, (2, 43, 128)


def random(*shape):
    return torch.randn(shape).half()


def weights(*shapes):
    return [random(*shape) * shape[-1] ** -0.5 for shape in shapes]


def written_by(name, mean=0.0):
    """A result of each op that writes what a LayerNorm may read."""
    x, (w, w1, w2), v = random(*SHAPE) + mean, weights((D, D), (4 * D, D), (D, 4 * D)), random(D)
    mlp = (1 + 0.1 * v, v, w1, random(4 * D), w2, v)
    if name == "linear_residual":
        return linear_residual.linear_residual(random(*SHAPE), w, v, x)
    if name == "skip_linear":
        return skip_linear.skip_linear(x, random(*SHAPE), *weights((D, 2 * D)), v + mean)
    if name == "proj_ln_mlp":
        return proj_ln_mlp.proj_ln_mlp(random(*SHAPE), w, v, x, *mlp)
    return ln_mlp.ln_mlp(x, *mlp)


def statistics(x, moments):
    v = random(D)
    return layernorm.prepare(x.reshape(-1, D), v, v, random(D, D), None, 1e-5, moments)[0][:, : x.numel() // D]


@in_the_interpreter
@pytest.mark.parametrize("name", ["linear_residual", "skip_linear", "proj_ln_mlp", "ln_mlp"])
def test_they_give_the_statistics_of_a_pass(name):
    torch.manual_seed(0)
    for mean in (0.0, 50.0):  # fifty deviations: squares alone would leave four digits of the variance
        y = written_by(name, mean)
        torch.testing.assert_close(statistics(y, layernorm.handed_on(y)), statistics(y, None), rtol=2e-6, atol=1e-6)


@in_the_interpreter
def test_they_pass_through_autograd_and_are_taken_by_the_next_op_once(monkeypatch):
    seen, prepare = [], layernorm.prepare
    monkeypatch.setattr(layernorm, "prepare", lambda *args: seen.append(args[6] is not None) or prepare(*args))
    x, w, v, qkv = random(*SHAPE).requires_grad_(), *weights((D, D)), random(D), random(3 * D, D)
    y = linear_residual.linear_residual(x, w, v, x)
    for _ in range(2):
        assert ln_linear.ln_linear(y, v, v, qkv).requires_grad
    assert seen == [True, False]


@in_the_interpreter
def test_a_result_that_was_changed_since_or_is_another_tensor_has_none():
    y = written_by("linear_residual")
    y[0, 0, 0] += 1
    assert layernorm.handed_on(y) is None
    assert layernorm.handed_on(written_by("linear_residual").clone()) is None
    with torch.inference_mode():  # whose tensors do not count their changes
        assert layernorm.handed_on(written_by("linear_residual")) is None
    x, (w,) = random(*SHAPE), weights((D, D))
    traced = torch.ops.uvit_fast.linear_residual.default(
        x, w, random(D), x
    )  # as compiled code calls it, which reuses results
    assert layernorm.handed_on(traced) is None


@in_the_interpreter
def test_a_result_that_only_a_skip_reads_does_not_keep_them():
    y = written_by("ln_mlp")
    skip_linear.skip_linear(y, random(*SHAPE), *weights((D, 2 * D)), random(D))
    assert layernorm.handed_on(y) is None


@compiles
def test_the_kernels_in_the_interpreter():
    interpreted.run(__file__)
