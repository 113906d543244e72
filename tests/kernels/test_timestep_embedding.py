"""The embedding of the time in plain Triton against its reference."""

import pytest
import torch
from torch.autograd import forward_ad

from uvit_fast.kernels.ops.timestep_embedding import reference, timestep_embedding, why_not
from uvit_fast.model import ops


def test_the_reference_is_cos_then_sin_and_takes_fractions():
    e = reference(torch.tensor([0.0, 2.5]), 8, torch.float32)
    assert e.dtype == torch.float32
    torch.testing.assert_close(e[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(
        e[1, [0, 4]], torch.tensor([2.5]).repeat(2).cos().where(torch.tensor([True, False]), torch.tensor(2.5).sin())
    )


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "t, dim, dtype",
    [
        (torch.tensor([0.0, 0.125, 17.0, 998.75, 999.0]), 512, torch.float32),  # VP: fractional; several programs a row
        (torch.tensor([0, 17, 999]), 768, torch.float16),  # SD: whole; half of dim is no power of two
        (torch.rand(3, 4, dtype=torch.float64)[:, 1], 72, torch.float32),  # strided, and narrower than a program
        (torch.tensor([7, 1], dtype=torch.int32)[1].expand(3), 64, torch.float32),  # one time for all: stride 0
    ],
    ids=["fractional", "whole", "strided", "expanded"],
)
def test_the_embedding_is_the_references(t, dim, dtype):
    """To the ulp of a frequency times t, and one of the result."""
    found, expected = timestep_embedding(t, dim, dtype), reference(t, dim, torch.float32)
    assert found.dtype == dtype and found.shape == (len(t), dim)
    tolerance = 2.4e-7 * (1 + t.double().max().item()) + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.interpreter
def test_what_it_cannot_take_is_named():
    t = torch.ones(2)
    assert why_not(t, 64, torch.bfloat16) is None
    assert why_not(t.requires_grad_(), 64, torch.bfloat16) == "the time wants a gradient"
    assert why_not(t.detach(), 63, torch.bfloat16) == "there are 2 times and 63 values for each"
    assert "the time is torch.bool" in why_not(t > 0, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="timestep_embedding: there are 0 times"):
        timestep_embedding(t[:0], 64, torch.float32)


@pytest.mark.interpreter
def test_a_derivative_in_forward_mode_is_the_references():
    t = torch.tensor([3.0, 500.0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones(2))
        assert "forward mode" in why_not(dual, 64, torch.float32)
        found = forward_ad.unpack_dual(ops.timestep_embedding(dual, 64, torch.float32)).tangent
    expected = torch.func.jvp(lambda t: reference(t, 64, torch.float32), (t,), (torch.ones(2),))[1]
    assert found.abs().max() > 0 and torch.equal(found, expected)


@pytest.mark.interpreter
def test_traced_it_is_one_op():
    def of(t):
        return timestep_embedding(t, 64, torch.float32) + 1

    t = torch.tensor([3.0, 5.0])
    assert torch.equal(torch.compile(of, fullgraph=True, backend="aot_eager")(t), of(t))
    torch.library.opcheck(torch.ops.uvit_fast.timestep_embedding.default, (t, 64, torch.float32))


def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="timestep_embedding: the tensors are on cpu"):
        timestep_embedding(torch.ones(2), 64, torch.float32)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_compiles_without_spills(arch):
    from uvit_fast.kernels.ops import timestep_embedding as op
    from uvit_fast.kernels.tools import aot

    args = (torch.empty(2, 768, device="meta", dtype=torch.bfloat16), torch.empty(2, device="meta"), 0, -9.2, 1 / 384)
    report = aot.compile(op._timestep_kernel, *args, arch=arch, HALF=384, BLOCK=op._BLOCK, num_warps=4)
    assert report["spilled"] == 0 and report["registers"] <= 64
