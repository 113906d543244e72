"""A device, by itself or by its name."""

import pytest
import torch

from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError


def test_a_device_may_be_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")  # the current one, whichever it is
    assert as_device("cpu") == as_device(cpu) == cpu and as_device("cuda") == cuda
    for name, words in (("gpu", "got 'gpu'"), ("cuda:1", "got 1 GPUs"), (3.5, "got 3.5")):
        with pytest.raises(UserError, match=words):
            as_device(name)
