"""The fused ops under the training engine: their kernels run in triton's interpreter, on partitions and with
recomputation.
"""

import pytest
import torch

from tests.training import test_uvit, tiny
from uvit_fast.model.uvit import Block, UViT


def config(policy: str, stage: int, kernels: str):
    """The smallest that the kernels take: heads of 32, five tokens."""
    cfg = tiny.config(iterations=2, warmup_steps=0, lr=2e-3, batch_size=2, zero_stage=stage)
    attention = "fused" if kernels == "fused" else "math"
    how = {"activation_checkpointing": policy, "kernels": kernels, "attention": attention}
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"embed_dim": 64, **how})})


@pytest.mark.interpreter
def test_fused_blocks_follow_plain_ones(tmp_path):
    """ZeRO-3 takes the weights away between the blocks; selective computes some ops again and takes others from its
    store.
    """
    plain = tiny.launch(test_uvit.train, tmp_path / "plain", config("none", 1, "reference"))
    fused = tiny.launch(test_uvit.train, tmp_path / "fused", config("selective", 3, "fused"))
    assert fused == pytest.approx(plain, rel=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("policy", ["selective", "block"])
def test_what_is_computed_again_gives_the_same_gradients(policy):
    """Also where fc1 alone is computed again, by another op than at first."""
    gradients = []
    for each in ("none", policy):
        torch.manual_seed(0)
        block = Block(64, 2, 4.0, True, "fused", "fused")
        block.checkpointing = each
        x, skip = (torch.randn(2, 5, 64, requires_grad=True) for _ in range(2))
        block(x, skip).square().sum().backward()
        gradients.append([t.grad for t in (x, skip, *block.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("condition", ["label", "text"])
def test_the_embeddings_learn_through_fused_tokens(condition):
    """Every parameter before the blocks has the gradient of plain PyTorch; a float64 image is taken as it comes."""
    torch.manual_seed(0)
    kind = {"num_classes": 5} if condition == "label" else {"context_dim": 8, "context_tokens": 3}
    sizes = dict(img_size=8, in_chans=3, patch_size=2, embed_dim=64, depth=0, num_heads=1, mlp_time_embed=True)
    net = UViT(**sizes, **kind, kernels="fused")
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.5, 999.0])
    given = (torch.tensor([4, 4]), None) if condition == "label" else (None, torch.randn(2, 3, 8))
    weights = [w for name, w in net.named_parameters() if "embed" in name or "label" in name]
    found = []
    for kernels in ("fused", "reference"):
        net.kernels = net.patch_embed.kernels = kernels
        tokens = net.tokens(x, t, *given)
        found.append([tokens, *torch.autograd.grad(tokens.square().sum(), weights)])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
