"""The optimizer's kernel on a GPU, where the network computes in bf16."""

import pytest
import torch

from tests.kernels.test_adamw import averages_slowly, follows_pytorch, is_refused

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_pytorchs_adamw(dtype):
    follows_pytorch(dtype, "cuda")


def test_the_average_moves_by_one_minus_its_decay():
    averages_slowly("cuda")


def test_a_refused_step_changes_nothing():
    is_refused("cuda")
