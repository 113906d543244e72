"""What all linear ops promise, in plain Triton: forward and gradients of the reference, sums of what was written,
refusals in a sentence.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.op_cases import OPS, WITH_SUMS, arguments, compare, result, tensors, with_tensors
from uvit_fast.kernels import gemm
from uvit_fast.kernels.layernorm import fold
from uvit_fast.kernels.layers import Linear, Norm

D = 128
# The paper's 257, 258 and 334 tokens, an odd batch, no multiple of a tile. fp32 shows the algebra, or the GELU's fit.
SHAPES = [((1, 257, D), torch.float32), ((3, 86, D), torch.float16), ((1, 334, D), torch.float32)]


def tolerance(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float16:
        return 2e-3 if name == "proj_ln_mlp" else 1e-3
    return 2e-4 if "mlp" in name else 2e-6


@pytest.mark.interpreter
@pytest.mark.parametrize("shape, dtype", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["ln_linear", "ln_mlp", "skip_linear", "linear_residual"])
def test_forward_and_gradients_match_the_reference(name, shape, dtype):
    torch.manual_seed(0)
    compare(*OPS[name], arguments(name, shape, dtype), tolerance(name, dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("name, shape, dtype", [
    ("proj_ln_mlp", (1, 257, D), torch.float32),
    ("proj_ln_mlp", (3, 43, D), torch.float16),
    ("ln_linear_bias", (1, 65, D), torch.float32),
    ("ln_linear_narrow", (1, 65, D), torch.float32),
])  # fmt: skip
def test_their_variants_match_the_reference(name, shape, dtype):
    torch.manual_seed(0)
    compare(*OPS[name], arguments(name, shape, dtype), tolerance(name, dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["ln_linear", "proj_ln_mlp", "skip_linear"])
def test_frozen_weights_cost_no_product(name, monkeypatch):
    """Fine-tuning: what lies behind something that learns passes the gradient on, the same to the bit, and no more."""
    torch.manual_seed(0)
    op, args = OPS[name][0], arguments(name, (1, 65, D), torch.float32, grad=True)
    frozen = [a if isinstance(a, Tensor) else type(a)(*with_tensors(Tensor.detach, list(a))) for a in args]
    through = [a for a in args if isinstance(a, Tensor)]
    dy = torch.randn_like(result(op(*args)).detach())
    wanted = torch.autograd.grad(result(op(*args)), through, dy)
    core = gemm.core(dy.device)
    monkeypatch.setattr(core, "weight_gradient", None)
    assert all(map(torch.equal, torch.autograd.grad(result(op(*frozen)), through, dy), wanted))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = with_tensors(lambda t: mode.from_tensor(t.detach()).requires_grad_(t.requires_grad), frozen)
        y = result(op(*fake))
        inputs = [a for a in fake if isinstance(a, Tensor)]
        assert [g.shape for g in torch.autograd.grad(y, inputs, torch.empty_like(y))] == [g.shape for g in wanted]


@pytest.mark.interpreter
@pytest.mark.parametrize("traced", [False, True])
def test_gradients_of_gradients_are_refused_not_wrong(traced, monkeypatch):
    monkeypatch.setattr("uvit_fast.kernels.runtime.op.is_watched", lambda x: traced)
    op, args = OPS["ln_linear"][0], arguments("ln_linear", (1, 9, D), torch.float32, grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula" if traced else "expected model.kernels=reference"):
        (dx,) = torch.autograd.grad(result(op(*args)).square().sum(), args[0], create_graph=True)
        dx.square().sum().backward()


@pytest.mark.interpreter
def test_under_activation_checkpointing():
    torch.manual_seed(0)
    op, reference = OPS["linear_residual"]
    args = arguments("linear_residual", (1, 65, D), torch.float32)
    compare(lambda *args: checkpoint(op, *args, use_reentrant=False), reference, args, 2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["ln_linear", "ln_mlp"])
def test_under_torch_compile_it_is_one_graph(name):
    torch.manual_seed(0)
    op, args = OPS[name][0], arguments(name, (1, 65, D), torch.float32)
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    assert torch.equal(result(compiled(*args)), result(op(*args)))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", WITH_SUMS)
def test_sums_beside_a_result_give_the_statistics_of_a_pass_over_it(name):
    """Also of a mean of fifty deviations, of which sums of squares alone would leave four digits of the variance."""
    torch.manual_seed(0)
    norm, linear = Norm(torch.randn(D).half(), torch.randn(D).half()), Linear(torch.randn(D, D).half())
    for mean in (0.0, 50.0):
        y, sums = OPS[name][0](*arguments(name, (2, 43, D), torch.float16, mean))
        flat = y.reshape(-1, D)
        merged, read = fold.prepare(flat, norm, linear, sums).stats, fold.prepare(flat, norm, linear).stats
        torch.testing.assert_close(merged[:, :86], read[:, :86], rtol=2e-6, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["ln_linear", "ln_mlp"])
def test_with_sums_an_op_reads_no_statistics_and_gives_the_same_gradients(name, monkeypatch):
    """Inside a graph: sums come from an op that takes gradients, and have none themselves."""
    torch.manual_seed(0)
    seen, prepare = [], fold.prepare
    monkeypatch.setattr(fold, "prepare", lambda *a, **k: seen.append(a[3] is not None) or prepare(*a, **k))
    first = with_tensors(lambda t: t.requires_grad_(), arguments("linear_residual", (2, 43, D), torch.float32))
    rest = arguments(name, (2, 43, D), torch.float32)[1:]
    gradients = []
    for with_sums in (True, False):
        y, sums = OPS["linear_residual"][0](*first)
        assert not sums.requires_grad
        out = result(OPS[name][0](y, *rest, sums if with_sums else None))
        gradients.append(torch.autograd.grad(out.square().sum(), tensors(first)))
    assert seen == [True, False]
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-5 * b.norm()  # two ways to fp32 statistics


@pytest.mark.interpreter
@pytest.mark.parametrize("name", WITH_SUMS)
def test_a_traced_op_gives_its_sums_too(name):
    torch.manual_seed(0)
    op, args = OPS[name][0], arguments(name, (1, 5, D), torch.float16)
    for a, b in zip(torch.compile(op, backend="eager", fullgraph=True)(*args), op(*args)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["ln_linear", "ln_mlp", "proj_ln_mlp", "skip_linear", "linear_residual"])
def test_on_a_cpu_it_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"{name}: the tensors are on cpu"):
        OPS[name][0](*arguments(name, (1, 3, D), torch.float32))
