"""Fused attention on a GPU, in bf16 and fp16, against fp32: no worse than twice PyTorch's own error, forward and
gradient.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from uvit_fast.kernels.ops.attention import attention, reference, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cores")]


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Every `empty` is filled with NaN, so that an element nobody wrote cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def random(B: int, L: int, H: int, D: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the output."""
    return (
        torch.randn(B, L, 3, H, D, device="cuda", dtype=dtype).requires_grad_(),
        torch.randn(B, L, H * D, device="cuda", dtype=dtype),
    )


def run(op, qkv: Tensor, dout: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    out = op(qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout.to(out.dtype))[0].unbind(2)]


def check(ours: list[Tensor], qkv: Tensor, dout: Tensor) -> None:
    exact = run(reference, qkv.detach().float().requires_grad_(), dout)
    eager = run(reference, qkv, dout)
    ulp = torch.finfo(qkv.dtype).eps
    for name, out, peer, r in zip(("out", "dq", "dk", "dv"), ours, eager, exact):
        assert out.shape == r.shape and out.dtype == qkv.dtype
        error, allowed = (out.float() - r).norm(), 2 * (peer.float() - r).norm() + 1e-4 * r.norm()
        assert error <= allowed, f"{name} is off by {error / r.norm():.2e}, allowed {allowed / r.norm():.2e}"
        error, allowed = (out.float() - r).abs().max(), 2 * (peer.float() - r).abs().max() + ulp * r.abs().max()
        assert error <= allowed, f"an element of {name} is off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize(
    "B, L, H, D",
    [
        (32, 258, 16, 72),  # H/2, more heads than fit the chip at once: a tail of two rows
        (5, 258, 16, 64),  # L/2, an odd batch
        (3, 257, 8, 64),  # CIFAR-10: a tail of one row
        (3, 334, 8, 64),  # text: several blocks of keys
        (3, 256, 3, 72),  # whole blocks alone
        (3, 301, 3, 72),  # a ragged last block
        (1, 64, 1, 64),  # one block, one head
        (3, 77, 2, 80),  # one block and a tail, the widest of Hopper's head dims
        (2, 512, 2, 64),  # the longest
        (3, 258, 3, 40),  # a head dim that plain Triton takes everywhere
        (2, 100, 2, 128),  # the widest head
    ],
    ids=str,
)
def test_bf16_error_is_at_most_twice_pytorchs(B, L, H, D):
    qkv, dout = random(B, L, H, D)
    check(run(attention, qkv, dout), qkv, dout)


@pytest.mark.parametrize("D", [64, 72])
def test_fp16_error_is_at_most_twice_pytorchs(D):
    qkv, dout = random(3, 258, 3, D, torch.float16)
    check(run(attention, qkv, dout), qkv, dout)


@pytest.mark.parametrize("L", [258, 301])
def test_very_negative_scores_leave_no_nan(L):
    """Every score is near -1000: 2 to the minus log-sum-exp overflows on a padded key unless it is masked."""
    qkv, dout = random(2, L, 2, 72)
    with torch.no_grad():
        qkv[:, :, 0] = 11 + 0.125 * torch.randn_like(qkv[:, :, 0])
        qkv[:, :, 1] = -11 + 0.125 * torch.randn_like(qkv[:, :, 1])
    ours = run(attention, qkv, dout)
    assert all(t.isfinite().all() for t in ours)
    check(ours, qkv, dout)


def test_the_gradient_is_the_same_bits_every_time():
    qkv, dout = random(16, 258, 16, 72)
    first, second = run(attention, qkv, dout), run(attention, qkv, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_strided_and_misaligned_inputs_are_taken():
    qkv, dout = random(2, 258, 2, 64)
    memory = torch.empty(qkv.numel() + 1, device="cuda", dtype=qkv.dtype)
    moved = memory[1:].view(qkv.shape).copy_(qkv.detach()).requires_grad_()
    check(run(attention, moved, dout), qkv, dout)
    turned = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    check(run(attention, turned, dout), qkv, dout)


def test_compile_and_checkpoint_give_the_same_bits():
    qkv, dout = random(2, 258, 2, 72)
    plain = run(attention, qkv, dout)
    compiled = run(torch.compile(lambda x: attention(x) * 1.0, fullgraph=True), qkv, dout)
    again = run(lambda x: checkpoint(attention, x, use_reentrant=False), qkv, dout)
    for a, b, c in zip(plain, compiled, again):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_captured_graph_reads_new_inputs():
    qkv, dout = random(2, 258, 2, 72)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(attention, qkv, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(attention, qkv, dout)
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(attention, qkv, dout)))


def test_longer_sequences_are_left_to_others():
    assert why_not(torch.empty(1, 513, 3, 1, 64, device="cuda", dtype=torch.bfloat16))
