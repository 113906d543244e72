"""A step of AdamW, the average and the network's copy in one kernel: PyTorch's own AdamW, and nothing at all where it
is refused.
"""

import pytest
import torch

from uvit_fast.kernels.ops import adamw

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.03}
N = 2500  # no multiple of a program's share


def state(dtype, device="cpu"):
    torch.manual_seed(0)
    weights, gradient = torch.randn(N, device=device), torch.randn(N, device=device).to(dtype)
    moments = [torch.zeros(N, device=device) for _ in range(2)]
    return adamw.Partition(weights, *moments, weights.clone(), torch.zeros(N, device=device, dtype=dtype), gradient)


def settings(decay=0.9):
    return adamw.Settings(**SETTINGS, decay=decay)


def numbers(step, keep=1.0, scale=1.0, device="cpu"):
    betas = torch.tensor(SETTINGS["betas"], dtype=torch.float64, device=device)
    return adamw.factors(*(torch.tensor(v, device=device) for v in (keep, scale, float(step))), betas)


def pytorchs(weights, gradients):
    """The weights after PyTorch's AdamW, in fp64, and their average after each step."""
    p = weights.double().requires_grad_()
    optimizer, average = torch.optim.AdamW([p], **SETTINGS), weights.double()
    for g in gradients:
        p.grad = g.double()
        optimizer.step()
        average.lerp_(p.detach(), 0.1)
    return p.detach(), average


def follows_pytorch(dtype, device="cpu"):
    """Three steps with gradients of their own, the first of them scaled."""
    part, scales = state(dtype, device), (0.1, 1.0, 1.0)
    start, gradients = part.weights.clone(), [torch.randn(N, device=device).to(dtype) for _ in scales]
    for step, (g, scale) in enumerate(zip(gradients, scales), 1):
        adamw.adamw(part._replace(gradient=g), numbers(step, scale=scale, device=device), settings())
    weights, average = pytorchs(start, [g.double() * scale for g, scale in zip(gradients, scales)])
    torch.testing.assert_close(part.weights.double(), weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.average.double(), average, rtol=1e-6, atol=1e-6)
    assert torch.equal(part.computed, part.weights.to(dtype))


def averages_slowly(device="cpu"):
    """The paper's 0.9999: a ten thousandth of the way to the weights, to five digits, though in fp32 1 - 0.9999 is off
    in the fourth.
    """
    part = state(torch.float32, device)
    part.average.zero_()
    adamw.adamw(part, numbers(1, device=device), settings(decay=0.9999))
    torch.testing.assert_close(part.average.double(), 1e-4 * part.weights.double(), rtol=1e-5, atol=0)


def is_refused(device="cpu"):
    part = state(torch.float32, device)
    adamw.adamw(part, numbers(1, device=device), settings())
    part.gradient.fill_(float("nan"))
    before = [t.clone() for t in part[:-1]]
    adamw.adamw(part, numbers(2, keep=0.0, scale=float("nan"), device=device), settings())
    assert all(torch.equal(a, b) for a, b in zip(part, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_step_in_plain_pytorch_is_pytorchs_adamw(dtype):
    follows_pytorch(dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_of_the_kernel_is_pytorchs_adamw(dtype):
    follows_pytorch(dtype)


@pytest.mark.interpreter
def test_the_average_moves_by_one_minus_its_decay():
    averages_slowly()


@pytest.mark.interpreter
def test_a_refused_step_changes_nothing():
    is_refused()


def test_without_the_kernel_too():
    averages_slowly()
    is_refused()


def test_other_lengths_are_refused():
    part = state(torch.float32)
    with pytest.raises(ValueError, match="one length"):
        adamw.adamw(part._replace(gradient=part.gradient[1:]), numbers(1), settings())
