"""The final image in plain Triton against its reference."""

import pytest
import torch

from uvit_fast.kernels.ops.unpatchify import reference, unpatchify, why_not


def arguments(B, side, patch, C, dtype=torch.float32):
    """Tokens cut out of longer sequences, and a convolution."""
    h = torch.randn(B, 2 + (side // patch) ** 2, C * patch**2)[:, 2:]
    return h.to(dtype), patch, (torch.randn(C, C, 3, 3).to(dtype), torch.randn(C).to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "sizes, dtype, result, tolerance",
    [
        ((2, 12, 2, 4), torch.float32, torch.float32, 1e-5),  # latents; the last program is not full
        ((3, 8, 4, 3), torch.float16, torch.float32, 1e-5),  # pixels, three channels; one program an image
        ((1, 8, 1, 5), torch.float16, torch.float16, 2e-3),  # a patch is a pixel; channels of two rounds
    ],
    ids=["latents", "pixels", "patches of a pixel"],
)
def test_the_image_is_the_references(sizes, dtype, result, tolerance):
    torch.manual_seed(0)
    h, patch, conv = arguments(*sizes, dtype=dtype)
    found = unpatchify(h, patch, conv, result)
    expected = reference(h.double(), patch, tuple(w.double() for w in conv), torch.float64)
    assert found.dtype == result and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.interpreter
def test_what_it_cannot_take_is_named():
    h, patch, conv = arguments(1, 4, 2, 4)
    assert why_not(h, patch, conv, torch.float32) is None
    assert "there is no convolution" in why_not(h, patch, None, torch.float32)
    assert "no square image" in why_not(h[:, 1:], patch, conv, torch.float32)
    assert "the image torch.int64" in why_not(h, patch, conv, torch.int64)
    assert "the image 16 channels" in why_not(h, 1, conv, torch.float32)
    assert why_not(h, patch, (conv[0].requires_grad_(), conv[1]), torch.float32) == "a gradient is wanted"


@pytest.mark.interpreter
def test_traced_it_is_one_op():
    h, patch, conv = arguments(2, 4, 2, 4)

    def of(h):
        return unpatchify(h, patch, conv, torch.float32) + 1

    assert torch.equal(torch.compile(of, fullgraph=True, backend="aot_eager")(h), of(h))


def test_without_a_convolution_it_is_one_copy_in_its_dtype():
    h, patch, _ = arguments(2, 8, 2, 3, dtype=torch.bfloat16)
    image = reference(h, patch, None, torch.float32)
    assert image.dtype == torch.float32 and image.shape == (2, 3, 8, 8) and image.is_contiguous()
    assert torch.equal(image[1, 2, 5, 0], h[1, 2 * 4, 1 * 2 * 3 + 2].float())  # patch (2, 0), pixel (1, 0), channel 2


def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="unpatchify: the tensors are on cpu"):
        unpatchify(*arguments(1, 4, 2, 4), torch.float32)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_compiles_without_spills_or_shared_memory(arch):
    from uvit_fast.kernels.ops import unpatchify as op
    from uvit_fast.kernels.tools import aot

    h, weight, bias = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((258, 16), (4, 36), (4,)))
    args = (torch.empty(4, 1024, device="meta"), h, weight, bias, 258 * 16, 16)
    report = aot.compile(op._unpatchify_kernel, *args, arch=arch, **op.tile(32, 2, 4))
    assert report["spilled"] == 0 and report["registers"] <= 64 and report["shared"] == 0
