"""Every attention backend computes the same thing, and `auto` says what it chose and why."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from uvit_fast.model.attention import attend, choose


@pytest.mark.parametrize("tokens", [257, 334])  # the unconditional and the text models' lengths: no multiple of a tile
def test_cpu_backends_agree(tokens):
    qkv = torch.randn(1, tokens, 3, 2, 24, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT * 24**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(1, tokens, 48)
    for backend in ("math", "sdpa", "auto"):
        torch.testing.assert_close(attend(qkv, backend), expected)


def test_auto_says_why_the_faster_ones_were_passed_over():
    assert choose(torch.empty(1, 258, 3, 16, 72)) == ("sdpa", "the others need a GPU, got float32 on cpu")
    with FakeTensorMode():
        name, reason = choose(torch.empty(1, 258, 3, 16, 72, device="cuda"))
    assert name == "sdpa"
    for passed_over in ("fused", "cudnn", "flash_attn"):
        assert f"not {passed_over}" in reason


@pytest.mark.parametrize("backend", ["fused", "cudnn", "flash_attn", "xformers"])
def test_a_backend_asked_for_by_name_is_refused_rather_than_replaced(backend):
    with pytest.raises(ValueError, match=f"model.attention={backend} cannot run"):
        attend(torch.empty(1, 258, 3, 2, 64), backend)


def test_unknown_backend_names_the_known():
    with pytest.raises(ValueError, match="expected auto or one of .*flash_attn.*got 'flash'"):
        attend(torch.empty(1, 258, 3, 2, 64), "flash")
