"""assemble in plain Triton against its reference, and what it refuses."""

import pytest
import torch

from tests.kernels.op_cases import compare
from uvit_fast.kernels.ops import assemble


def arguments(B, C, side, p, extras, D, dtype=torch.float32):
    x, weight = torch.randn(B, C, side, side), torch.randn(D, C, p, p) * (C * p * p) ** -0.5
    rest = (torch.randn(D), torch.randn(B, extras, D), torch.randn(1, extras + (side // p) ** 2, D))
    return [t.to(dtype) for t in (x, weight, *rest)]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "sizes, dtype, tolerance",
    [
        ((3, 4, 16, 2, 2, 192), torch.float32, 2e-6),  # latents, no multiple of either side of a tile
        ((2, 3, 12, 4, 1, 64), torch.float32, 2e-6),  # 48 values a patch, padded
        ((2, 1, 6, 2, 70, 64), torch.float16, 1e-3),  # more text than patches
        ((2, 32, 5, 1, 2, 192), torch.float32, 2e-6),  # DC-AE's latents: a patch is a pixel of 32 channels
    ],
    ids=str,
)
def test_forward_and_gradients_match_the_reference(sizes, dtype, tolerance):
    torch.manual_seed(0)
    x, *rest = arguments(*sizes, dtype=dtype)

    def of(op):
        return lambda *weights: op(x.to(weights[0].dtype), *weights)

    compare(of(assemble.assemble), of(assemble.reference), rest, tolerance)


@pytest.mark.interpreter
def test_images_and_positions_of_any_layout_are_taken():
    torch.manual_seed(0)
    x, weight, bias, extras, positions = arguments(2, 4, 8, 2, 2, 64)
    turned = (x.to(memory_format=torch.channels_last), weight, bias, extras.mT.contiguous().mT, positions)
    torch.testing.assert_close(assemble.assemble(*turned), assemble.assemble(x, weight, bias, extras, positions))


def refused(*sizes, **changes):
    names = ("x", "weight", "bias", "extras", "positions")
    return assemble.why_not(*(dict(zip(names, arguments(*sizes))) | changes).values())


@pytest.mark.interpreter
def test_what_it_cannot_take_is_named():
    assert refused(1, 4, 8, 2, 2, 64) is None
    assert "7 x 7, does not divide into patches of 2 x 2" in refused(1, 4, 7, 2, 2, 64)
    assert "a patch has 768 values; the fused op takes 256" in refused(1, 3, 32, 16, 2, 64)
    assert "the image wants a gradient" in refused(1, 4, 8, 2, 2, 64, x=torch.randn(1, 4, 8, 8, requires_grad=True))
    assert "positions has the shape (1, 3, 64), not (1, 18, 64)" in refused(
        1, 4, 8, 2, 2, 64, positions=torch.randn(1, 3, 64)
    )


def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="assemble: the tensors are on cpu"):
        assemble.assemble(*arguments(1, 4, 8, 2, 2, 64))
