"""linear_residual in plain Triton against its reference, and what it refuses."""

import pytest
import torch

from tests.kernels import interpreted
from tests.kernels.interpreted import compare, compiles, in_the_interpreter
from uvit_fast.kernels.ops import linear_residual

D = 128
# (shape, dtype, tolerance): the paper's 257, 258 and 334 tokens, an odd batch, no multiple of a tile. fp32 shows the algebra.
CASES = [
    ((1, 257, D), torch.float32, 2e-6),
    ((3, 86, D), torch.float16, 1e-3),
    ((1, 334, D), torch.float32, 2e-6),
]


def arguments(shape, dtype):
    weight = torch.randn(D, D) * D**-0.5
    return [t.to(dtype) for t in (torch.randn(shape), weight, torch.randn(D), torch.randn(shape))]


@in_the_interpreter
@pytest.mark.parametrize("shape, dtype, tolerance", CASES, ids=str)
def test_forward_and_gradients_match_the_reference(shape, dtype, tolerance):
    torch.manual_seed(0)
    compare(linear_residual.linear_residual, linear_residual.reference, arguments(shape, dtype), tolerance)


@compiles
def test_the_kernels_in_the_interpreter():
    interpreted.run(__file__)


@compiles
def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="linear_residual: the tensors are on cpu"):
        linear_residual.linear_residual(*arguments((1, 3, D), torch.float32))


@in_the_interpreter
def test_under_activation_checkpointing():
    torch.manual_seed(0)

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(linear_residual.linear_residual, *args, use_reentrant=False)

    compare(checkpointed, linear_residual.reference, arguments((1, 65, D), torch.float32), 2e-6)
