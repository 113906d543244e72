"""The fused ops on a GPU, in bf16 and fp16, against fp32: no worse than twice PyTorch's own error, forward and every
gradient.
"""

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.op_cases import OPS, WITH_SUMS, arguments, result, results_and_gradients, tensors, with_tensors
from uvit_fast.kernels.ops import assemble, linear_residual, ln_mlp, timestep_embedding, unpatchify

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cores")]


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Every `empty` is filled with NaN, so that an element nobody wrote cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def on_gpu(name: str, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.3, grad: bool = True) -> list:
    return arguments(name, shape, dtype, mean, "cuda", grad)


def check(name: str, args: list, op=None) -> None:
    fused, reference = OPS[name]
    exact = with_tensors(lambda t: t.detach().float().requires_grad_(), args)
    with torch.no_grad():
        dy = torch.randn_like(reference(*args))
    torch.backends.cuda.matmul.allow_tf32 = False
    ref = results_and_gradients(reference, exact, dy)
    eager = results_and_gradients(reference, args, dy)
    ours = results_and_gradients(op or fused, args, dy)
    ulp = torch.finfo(dy.dtype).eps
    for i, (out, peer, r) in enumerate(zip(ours, eager, ref)):
        assert out.shape == r.shape and out.dtype == dy.dtype
        error, allowed = (out.float() - r).norm(), 2 * (peer.float() - r).norm() + 1e-4 * r.norm()
        assert error <= allowed, (
            f"{name}: result {i} is off by {error / r.norm():.2e}, allowed {allowed / r.norm():.2e}"
        )
        error, allowed = (out.float() - r).abs().max(), 2 * (peer.float() - r).abs().max() + ulp * r.abs().max()
        assert error <= allowed, f"{name}: an element of result {i} is off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "shape",
    [
        (128, 258, 1152),  # H/2 at its batch: every tile full
        (37, 257, 512),  # an odd batch of an odd length: tiles cut off in tokens
        (5, 334, 512),  # S/2 with text, small: tiles of fewer tokens, cut off too
        (3, 257, 768),  # an odd number of tokens in all, no multiple of any tile
        (1, 258, 1024),  # one image: fewer tiles than multiprocessors
        (1, 1, 64),  # one token of the narrowest width
    ],
    ids=str,
)
def test_bf16_error_is_at_most_twice_pytorchs(name, shape):
    check(name, on_gpu(name, shape, torch.bfloat16))


@pytest.mark.parametrize("name", OPS)
def test_fp16_error_is_at_most_twice_pytorchs(name):
    check(name, on_gpu(name, (3, 257, 768), torch.float16))


@pytest.mark.parametrize("name", ["ln_linear", "ln_mlp"])
def test_a_mean_of_eight_deviations_costs_the_fold_nothing(name):
    check(name, on_gpu(name, (3, 258, 1152), torch.bfloat16, mean=8.0))


@pytest.mark.parametrize("name", OPS)
def test_strided_and_misaligned_inputs_are_taken(name):
    args = on_gpu(name, (3, 257, 512), torch.bfloat16)
    wide = torch.randn(257, 3, 513, device="cuda", dtype=torch.bfloat16)
    args[0] = wide.transpose(0, 1)[..., 1:].detach().requires_grad_()
    check(name, args)


def test_an_op_may_be_the_first_that_a_thread_does_on_the_gpu():
    """As in autograd's thread, where memory comes from the cache: nothing else makes a context current there."""
    args = on_gpu("linear_residual", (3, 257, 512), torch.bfloat16, grad=False)
    expected, results = linear_residual.linear_residual(*args)[0], []
    thread = threading.Thread(target=lambda: results.append(linear_residual.linear_residual(*args)[0]))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("name", OPS)
def test_two_runs_are_bit_identical(name):
    args = on_gpu(name, (16, 258, 1152), torch.bfloat16)
    dy = torch.randn_like(OPS[name][1](*args))
    first, second = (results_and_gradients(OPS[name][0], args, dy) for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_compiled_in_one_graph(name):
    check(name, on_gpu(name, (3, 257, 512), torch.bfloat16), torch.compile(OPS[name][0], fullgraph=True))


@pytest.mark.parametrize("name", OPS)
def test_under_activation_checkpointing(name):
    check(
        name,
        on_gpu(name, (3, 257, 512), torch.bfloat16),
        lambda *args: checkpoint(OPS[name][0], *args, use_reentrant=False),
    )


@pytest.mark.parametrize("name", OPS)
def test_captured_in_a_cuda_graph(name):
    args = on_gpu(name, (3, 257, 512), torch.bfloat16, grad=False)
    fused = OPS[name][0]
    expected = result(fused(*args))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = result(fused(*args))
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "name, most", [("ln_linear", 1), ("ln_mlp", 5), ("linear_residual", 1), ("proj_ln_mlp", 6), ("skip_linear", 2)]
)
def test_the_backward_keeps_few_values_a_token(name, most):
    """In units of D values per token; the parameters, which live anyway, are not counted."""
    args = on_gpu(name, (4, 258, 512), torch.bfloat16)
    tokens, kept = 4 * 258, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        OPS[name][0](*args)
    parameters = {t.data_ptr() for t in tensors(args) if t.dim() < 3}
    values = sum(t.numel() for t in kept if t.data_ptr() not in parameters and t.dtype == torch.bfloat16)
    assert values <= most * tokens * 512


def test_the_last_backward_which_overwrites_gives_what_others_give():
    """GELU(h) in h's place, to the bit: H/2 at its batch, and tokens that leave the last tile half empty."""
    for shape in ((128, 258, 1152), (3, 258, 1152)):
        args = on_gpu("ln_mlp", shape, torch.bfloat16)
        y, _ = ln_mlp.ln_mlp(*args)
        dy = torch.randn_like(y)
        first = torch.autograd.grad(y, tensors(args), dy, retain_graph=True)
        last = torch.autograd.grad(y, tensors(args), dy)
        assert all(torch.equal(a, b) for a, b in zip(first, last))


@pytest.mark.parametrize("name", WITH_SUMS)
def test_the_sums_that_come_with_a_result_are_its_sums(name):
    """Large and small tiles, cut off in tokens and in features; a mean that squares alone would not survive."""
    for shape in ((37, 257, 1152), (3, 257, 768), (1, 258, 1024), (1, 1, 64)):
        y, found = OPS[name][0](*on_gpu(name, shape, torch.bfloat16, mean=20.0, grad=False))
        parts = y.double().view(-1, shape[-1] // 64, 64)
        expected = torch.stack([parts.sum(2), parts.var(2, unbiased=False) * 64])
        torch.testing.assert_close(found, expected.permute(2, 0, 1).float(), rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize(
    "B, C, side, p, extras, D",
    [
        (128, 4, 32, 2, (1, 1), 1152),  # H/2 at its batch: latents, a label and the time
        (37, 3, 64, 4, (1,), 512),  # pixels, a product of 48 values, an odd number of tokens
        (3, 4, 32, 2, (1, 77), 512),  # text
        (1, 1, 8, 2, (2,), 64),  # one small image: four values, padded to sixteen
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_assembled_tokens_are_no_worse_than_pytorchs(B, C, side, p, extras, D, compiled):
    x, w, positions = random(B, C, side, side), random(D, C, p, p) * (C * p * p) ** -0.5, sum(extras) + (side // p) ** 2
    learnt = [t.bfloat16() for t in (w, random(D), random(1, positions, D), *(random(B, each, D) for each in extras))]
    dy = random(B, positions, D).bfloat16()

    def results(op, dtype):
        w, b, places, *given = made = [t.to(dtype).requires_grad_() for t in learnt]
        y = op(x if dtype == torch.bfloat16 else x.bfloat16().float(), w, b, given, places)
        return [y, *torch.autograd.grad(y, made, dy.to(dtype))]

    torch.backends.cudnn.allow_tf32 = False
    ours = results(torch.compile(assemble.assemble, fullgraph=True) if compiled else assemble.assemble, torch.bfloat16)
    peers, exact = (results(assemble.reference, dtype) for dtype in (torch.bfloat16, torch.float32))
    for out, peer, r in zip(ours, peers, exact):
        error, allowed = (out.float() - r).norm(), 2 * (peer.float() - r).norm() + 1e-4 * r.norm()
        assert out.shape == r.shape and error <= allowed


@pytest.mark.parametrize("D", [512, 768, 1024, 1152])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_times_embedding_has_pytorchs_bits(D, dtype):
    """Whole times of SD, fractional ones of VP, one time for all images."""
    for t in (torch.arange(1000, device="cuda"), 999 * torch.rand(1000, device="cuda"), random(3)[1].expand(5)):
        ours, peer = (op(t, D, dtype) for op in (timestep_embedding.timestep_embedding, timestep_embedding.reference))
        assert torch.equal(ours, peer)


@pytest.mark.parametrize(
    "B, side, patch, C, result",
    [
        (1, 32, 2, 4, torch.float32),  # latents, one image
        (37, 64, 4, 3, torch.bfloat16),  # pixels
    ],
)
def test_the_final_image_is_no_worse_than_pytorchs(B, side, patch, C, result):
    h, w, b = random(B, 2 + (side // patch) ** 2, C * patch**2)[:, 2:], random(C, C, 3, 3), random(C)
    h, w, b = h.bfloat16(), w.bfloat16(), b.bfloat16()
    ours, peer = (op(h, patch, (w, b), result) for op in (unpatchify.unpatchify, unpatchify.reference))
    exact = unpatchify.reference(h.double(), patch, (w.double(), b.double()), torch.float64)
    assert (ours - exact).norm() <= 2 * (peer - exact).norm() + 1e-6 * exact.norm()
