"""A device, by itself or by its name."""

import pytest
import torch

from uvit_fast.runtime.device import as_device, set_to
from uvit_fast.runtime.errors import UserError


def test_a_device_may_be_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")  # the current one, whichever it is
    assert as_device("cpu") == as_device(cpu) == cpu and as_device("cuda") == cuda
    for name, words in (("gpu", "got 'gpu'"), ("cuda:1", "got 1 GPUs"), (3.5, "got 3.5")):
        with pytest.raises(UserError, match=words):
            as_device(name)


@pytest.mark.parametrize("older", ["highest", "high", "medium", None])
def test_a_setting_is_afterwards_as_it_was(older):
    """Also one set by PyTorch's older way, and one that follows another and will follow it again."""
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        if older is None:
            torch.backends.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(older)
        was = matmul.fp32_precision
        with set_to(matmul, fp32_precision="ieee" if was == "tf32" else "tf32"):
            assert matmul.fp32_precision != was
        assert matmul.fp32_precision == was
        if older is None:
            torch.backends.fp32_precision = "ieee"
            assert matmul.fp32_precision == "ieee"
        else:
            assert torch.get_float32_matmul_precision() == older
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)
