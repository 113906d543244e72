"""The whole network with the fused kernels, of either architecture:
no further from fp32 than twice PyTorch's own ops.
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from uvit_fast.model.uvit import UViT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cores")]


def network(D: int, heads: int, kernels: str, attention: str, **more) -> UViT:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "in_chans": 4, "patch_size": 2, "depth": 4, **more}
    with torch.device("cuda"):
        return UViT(embed_dim=D, num_heads=heads, kernels=kernels, attention=attention, **sizes)


def results(net: UViT, dtype: torch.dtype, inputs: tuple, conditions: dict) -> list[Tensor]:
    """eps without gradients, eps with them, and the gradient of every parameter, fp32."""
    net = deepcopy(net).to(dtype)
    with torch.no_grad():
        eps = net(*inputs, **conditions)
    loss = (net(*inputs, **conditions) - inputs[0]).square().mean()
    gradients = torch.autograd.grad(loss * 64, [*net.parameters()])  # fp16's small numbers would be lost
    return [t.float() for t in (eps, *gradients)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D, heads, B, text", [
    (512, 8, 5, True),  # S with text: 334 tokens
    (768, 12, 37, False),  # M, an odd batch: the last tiles are cut off
    (1024, 16, 3, False),  # L, few tiles
    (1152, 16, 7, False),  # H: heads of 72
])  # fmt: skip
def test_errors_are_at_most_twice_pytorchs(D, heads, B, text, dtype):
    """Over four inputs together: of one, the error of a parameter of 16 numbers is as much chance as arithmetic."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    condition = {"context_dim": 768} if text else {"num_classes": 1001}
    fused, plain = (network(D, heads, *how, **condition) for how in (("fused", "fused"), ("reference", "math")))
    squares = []  # of each input and result: our error's, PyTorch's error's, the result's
    for seed in range(1, 5):
        torch.manual_seed(seed)
        inputs = torch.randn(B, 4, 32, 32, device="cuda"), torch.rand(B, device="cuda") * 999
        given = {"context": torch.randn(B, 77, 768, device="cuda")} if text else {"y": torch.arange(B, device="cuda")}
        exact = results(plain, torch.float32, inputs, given)
        ours, eager = (results(net, dtype, inputs, given) for net in (fused, plain))
        found = [
            ((o - r).square().sum(), (e - r).square().sum(), r.square().sum()) for o, e, r in zip(ours, eager, exact)
        ]
        squares.append(torch.tensor(found))
    error, peer, size = torch.stack(squares).sum(0).sqrt().unbind(1)
    allowed = 2 * peer + 1e-3 * size
    for i in range(len(size)):
        told = f"result {i} is off by {error[i] / size[i]:.2e}, allowed {allowed[i] / size[i]:.2e}"
        assert error[i] <= allowed[i], told
