"""The network is the published one: names, shapes, conditions, skips."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from uvit_fast.model.uvit import UViT

TINY = {"img_size": 8, "in_chans": 3, "patch_size": 2, "embed_dim": 32, "depth": 4, "num_heads": 4}


def tiny(**changes) -> UViT:
    torch.manual_seed(0)
    return UViT(**{**TINY, **changes})


class SavedNumbers(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward."""

    def __init__(self):
        self.count = 0
        super().__init__(self._keep, lambda s: s)

    def __enter__(self):
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        self.count += tensor.numel()
        return tensor


def published_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int, patch: int) -> Tensor:
    """The class-conditional U-ViT written from its published parameters alone, one line an operation."""

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, h):
        return F.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def block(name, h, skip=None):
        if skip is not None:
            h = linear(f"{name}.skip_linear", torch.cat([h, skip], -1))
        B, L, D = h.shape
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", h)).view(B, L, 3, heads, -1).permute(2, 0, 3, 1, 4)
        a = ((q @ k.transpose(-1, -2)) * (D // heads) ** -0.5).softmax(-1) @ v
        h = h + linear(f"{name}.attn.proj", a.transpose(1, 2).reshape(B, L, D))
        return h + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h))))

    B, C, H, _ = x.shape
    D, n = state["pos_embed"].shape[-1], H // patch
    h = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch).flatten(2).mT
    freqs = 10000 ** (-torch.arange(D // 2) / (D // 2))
    time = torch.cat([(t[:, None] * freqs).cos(), (t[:, None] * freqs).sin()], -1)
    label = state["label_emb.weight"][y]
    h = torch.cat([label[:, None], time[:, None], h], 1) + state["pos_embed"]
    depth = sum(name.startswith("in_blocks") and name.endswith("norm1.weight") for name in state)
    skips = []
    for i in range(depth):
        h = block(f"in_blocks.{i}", h)
        skips.append(h)
    h = block("mid_block", h)
    for i in range(depth):
        h = block(f"out_blocks.{i}", h, skips[depth - 1 - i])
    h = linear("decoder_pred", norm("norm", h))[:, 2:]
    h = h.view(B, n, n, patch, patch, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, H)
    return F.conv2d(h, state["final_layer.weight"], state["final_layer.bias"], padding=1)


def test_forward_is_the_published_one():
    model = tiny(num_classes=5)
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 417.25, 999.0]), torch.tensor([0, 4, 2])
    expected = published_forward(model.state_dict(), x, t, y, heads=4, patch=2)
    torch.testing.assert_close(model(x, t, y=y), expected, rtol=1e-4, atol=1e-5)


def test_state_dict_has_the_published_names():
    names = set(tiny(num_classes=5, mlp_time_embed=True).state_dict())
    block = {f"{m}.{p}" for m in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    block.add("attn.qkv.weight")
    expected = {"pos_embed", "label_emb.weight"}
    expected |= {f"{m}.{p}" for m in ("patch_embed.proj", "time_embed.0", "time_embed.2") for p in ("weight", "bias")}
    expected |= {f"{m}.{p}" for m in ("norm", "decoder_pred", "final_layer") for p in ("weight", "bias")}
    for name in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"):
        expected |= {f"{name}.{p}" for p in block}
    expected |= {f"out_blocks.{i}.skip_linear.{p}" for i in (0, 1) for p in ("weight", "bias")}
    assert names == expected


def test_text_model_puts_time_first_then_text():
    model = tiny(context_dim=6, context_tokens=7)
    assert model.extras == 8 and model.pos_embed.shape == (1, 8 + 16, 32)
    context = torch.randn(2, 7, 6)
    eps = model(torch.randn(2, 3, 8, 8), torch.ones(2), context=context)
    assert eps.shape == (2, 3, 8, 8)
    # a token's place decides its position embedding: moving text by one place changes the output
    moved = model(torch.randn(2, 3, 8, 8), torch.ones(2), context=context.roll(1, 1))
    assert not torch.equal(eps, moved)


@pytest.mark.parametrize("skip", ["concat", "add", "none"])
def test_skip_modes_reach_the_deep_blocks_or_do_not(skip):
    """Zeroing in-block 0's weights after the fact: only a skip connection carries its output past the others."""
    model = tiny(skip=skip)
    assert (model.out_blocks[0].skip_linear is not None) == (skip == "concat")
    x, t = torch.randn(1, 3, 8, 8), torch.ones(1)
    seen = []
    for block in (model.in_blocks[0], model.in_blocks[1]):
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    got = []
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda module, args: got.append(args[1]))
    model(x, t)
    if skip == "none":
        assert got == [None, None]
    else:  # last in, first out
        assert got[0] is seen[1] and got[1] is seen[0]


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less():
    """selective computes fc1 once (attention on a CPU is not counted); what it keeps, PyTorch's hooks do not see."""
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2) * 999
    gradients, kept, products = {}, {}, {}
    for policy in ("none", "block", "selective"):
        model = tiny(activation_checkpointing=policy)
        with FlopCounterMode(display=False) as flops:
            with SavedNumbers() as saved:
                loss = model(x, t).square().mean()
            loss.backward()
        gradients[policy] = [p.grad for p in model.parameters()]
        kept[policy], products[policy] = saved.count, flops.get_total_flops()
    for policy in ("block", "selective"):
        for a, b in zip(gradients["none"], gradients[policy]):
            torch.testing.assert_close(a, b)
        assert kept[policy] < kept["none"] / 3
    fc1 = 2 * 2 * 17 * 32 * 128  # 2 a multiply-add, 2 images of 17 tokens
    assert products["none"] < products["selective"] == products["block"] - 5 * fc1


def test_initialisation_is_the_published_one():
    """Linears and pos_embed: truncated normal of 0.02, zero biases; nothing else is touched, nothing starts at zero."""
    model = tiny(embed_dim=256, num_classes=5)
    assert abs(model.mid_block.mlp.fc1.weight.std().item() - 0.02) < 5e-4
    assert abs(model.pos_embed.std().item() - 0.02) < 2e-3
    assert model.mid_block.mlp.fc1.bias.abs().max() == 0
    assert model.decoder_pred.weight.abs().max() > 0
    assert model.label_emb.weight.std() > 0.5  # PyTorch's own N(0, 1)
    assert model.patch_embed.proj.bias.abs().max() > 0


def test_half_precision_model_keeps_time_in_fp32_and_returns_the_inputs_dtype():
    """bf16 has steps of 4 at t = 999: the embedding must be computed before the cast."""
    model = tiny().bfloat16()
    x = torch.randn(2, 3, 8, 8)
    a, b = model(x, torch.tensor([998.0, 998.0])), model(x, torch.tensor([998.0, 999.0]))
    assert a.dtype == torch.float32
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    ("changes", "inputs", "words"),
    [
        ({}, {"x": torch.zeros(2, 4, 8, 8)}, r"x: expected shape \(B, 3, 8, 8\), got \(2, 4, 8, 8\)"),
        ({}, {"t": torch.zeros(3)}, r"t: expected shape \(2,\), got \(3,\)"),
        ({}, {"y": torch.zeros(2, dtype=torch.long)}, "the model has no classes"),
        ({"num_classes": 3}, {}, r"labels of shape \(2,\), got none"),
        (
            {"context_dim": 6},
            {"context": torch.zeros(2, 7, 6)},
            r"context: expected shape \(2, 77, 6\), got \(2, 7, 6\)",
        ),
        ({}, {"t": 3}, r"t: expected shape \(2,\), got int 3"),
        ({}, {"x": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "x: expected a floating-point type, got torch.uint8"),
        ({"num_classes": 3}, {"y": [0, 1]}, r"y: expected shape \(2,\), got list"),
        ({"num_classes": 3}, {"y": torch.zeros(2)}, "y: expected labels of int64 or int32, got torch.float32"),
        ({"num_classes": 3}, {"y": torch.tensor([3, 1])}, "y: expected labels from 0 to 2, got 3"),
        ({"num_classes": 3}, {"y": torch.tensor([0, -1])}, "y: expected labels from 0 to 2, got -1"),
        ({}, {"t": torch.zeros(2, device="meta")}, "t: expected on cpu, where x is, got meta"),
    ],
)
def test_wrong_inputs_are_named(changes, inputs, words):
    inputs = {"x": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2), **inputs}
    with pytest.raises(ValueError, match=words):
        tiny(**changes)(**inputs)


def test_a_network_of_another_image_size_compiles_too():
    """The compiler then takes the sizes for unknowns, which the check of the inputs has to bear."""
    for size in (4, 8):
        model, inputs = tiny(img_size=size), (torch.randn(2, 3, size, size), torch.rand(2))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
