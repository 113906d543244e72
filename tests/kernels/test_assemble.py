"""assemble in plain Triton against its reference, and what it refuses."""

import pytest
import torch

from tests.kernels.op_cases import compare
from uvit_fast.kernels.ops import assemble


def arguments(B, C, side, p, extras, D, dtype=torch.float32):
    x, weight = torch.randn(B, C, side, side), torch.randn(D, C, p, p) * (C * p * p) ** -0.5
    bias, positions = torch.randn(D), torch.randn(1, sum(extras) + (side // p) ** 2, D)
    tensors = [x, weight, bias, positions, *(torch.randn(B, each, D) for each in extras)]
    x, weight, bias, positions, *given = [t.to(dtype) for t in tensors]
    return [x, weight, bias, given, positions]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "sizes, dtype, tolerance",
    [
        ((3, 4, 16, 2, (1, 1), 192), torch.float32, 2e-6),  # latents, no multiple of either side of a tile
        ((2, 3, 12, 4, (1,), 64), torch.float32, 2e-6),  # 48 values a patch, padded
        ((2, 1, 6, 2, (1, 69), 64), torch.float16, 1e-3),  # more text than patches
        ((2, 32, 5, 1, (2,), 192), torch.float32, 2e-6),  # DC-AE's latents: a patch is a pixel of 32 channels
    ],
    ids=str,
)
def test_forward_and_gradients_match_the_reference(sizes, dtype, tolerance):
    torch.manual_seed(0)
    x, *rest = arguments(*sizes, dtype=dtype)

    def of(op):
        return lambda *weights: op(x, *weights)

    compare(of(assemble.assemble), of(assemble.reference), rest, tolerance)


@pytest.mark.interpreter
def test_images_and_positions_of_any_layout_are_taken():
    torch.manual_seed(0)
    x, weight, bias, (extras,), positions = arguments(2, 4, 8, 2, (2,), 64)
    turned = (x.to(memory_format=torch.channels_last), weight, bias, [extras.mT.contiguous().mT], positions)
    expected = assemble.assemble(x, weight, bias, [extras], positions)
    torch.testing.assert_close(assemble.assemble(*turned), expected)
    twice = x[:1].expand(2, -1, -1, -1)  # one image for both branches
    rest = (weight, bias, [extras], positions)
    assert torch.equal(assemble.assemble(twice, *rest), assemble.assemble(twice.contiguous(), *rest))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_is_rounded_as_pytorch_rounds_it_and_kept_rounded(dtype):
    torch.manual_seed(0)
    x, *rest = arguments(2, 4, 8, 2, (1, 1), 64, dtype=torch.float16)
    x, kept = torch.randn(2, 4, 8, 8, dtype=dtype), []
    rest[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tokens = assemble.assemble(x, *rest)
    assert torch.equal(tokens, assemble.assemble(x.half(), *rest))
    assert torch.equal(kept[0], x.half())


def refused(*sizes, **changes):
    names = ("x", "weight", "bias", "extras", "positions")
    return assemble.why_not(*(dict(zip(names, arguments(*sizes))) | changes).values())


@pytest.mark.interpreter
def test_what_it_cannot_take_is_named():
    assert refused(1, 4, 8, 2, (2,), 64) is None
    assert "there are 3 tensors of other tokens, not one or two" in refused(1, 4, 8, 2, (1, 1, 1), 64)
    assert "7 x 7, does not divide into patches of 2 x 2" in refused(1, 4, 7, 2, (2,), 64)
    assert "a patch has 768 values; the fused op takes 256" in refused(1, 3, 32, 16, (2,), 64)
    assert "the image wants a gradient" in refused(1, 4, 8, 2, (2,), 64, x=torch.randn(1, 4, 8, 8, requires_grad=True))
    assert "positions has the shape (1, 3, 64), not (1, 18, 64)" in refused(
        1, 4, 8, 2, (2,), 64, positions=torch.randn(1, 3, 64)
    )
    assert "the image is torch.int64" in refused(1, 4, 8, 2, (2,), 64, x=torch.ones(1, 4, 8, 8, dtype=torch.int64))


def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="assemble: the tensors are on cpu"):
        assemble.assemble(*arguments(1, 4, 8, 2, (2,), 64))
