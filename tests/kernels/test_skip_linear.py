"""What skip_linear refuses; what it shares with the other ops is in test_ops.py."""

import pytest
import torch

from tests.kernels.op_cases import arguments
from uvit_fast.kernels.layers import Linear
from uvit_fast.kernels.ops.skip_linear import why_not

D = 128


@pytest.mark.interpreter
def test_why_not_names_a_skip_of_another_shape():
    x, skip, linear = arguments("skip_linear", (1, 3, D), torch.float16)
    assert why_not(x, skip, linear) is None
    assert "skip has the shape" in why_not(x, skip[:, 1:], linear)
    assert "linear.weight has the shape" in why_not(x, skip, Linear(linear.weight[:, :D], linear.bias))
