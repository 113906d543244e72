"""A device, by itself or by its name."""

import pytest
import torch

from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError


def test_a_device_may_be_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cpu = torch.device("cpu")
    assert as_device("cpu") == as_device(cpu) == as_device("auto") == cpu and as_device("meta").type == "meta"
    for name, words in (("gpu", "got 'gpu'"), ("cuda", "no CUDA device was found"), ("cuda:1", "got 0 GPUs")):
        with pytest.raises(UserError, match=words):
            as_device(name)
