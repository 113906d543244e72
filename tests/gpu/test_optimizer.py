"""The optimizer's kernel on a GPU, where the network computes in bf16."""

import pytest
import torch

from tests.kernels.test_adamw import follows_pytorch, is_refused
from uvit_fast.kernels.adamw import adamw

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_is_pytorchs_adamw(dtype):
    follows_pytorch(adamw, dtype, "cuda")


def test_a_step_that_the_kernel_refuses_changes_nothing():
    is_refused(adamw, "cuda")
