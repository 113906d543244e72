"""A network whose modules were changed from outside computes what was asked for: hooks, wrapped, quantised and
exchanged layers.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune

from tests.model.test_uvit import published_forward, tiny
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.hooks import changed

PARTS = ["patch_embed.proj", "norm", "decoder_pred", "mid_block.norm1", "mid_block.attn", "mid_block.attn.qkv"]
PARTS += ["mid_block.attn.proj", "mid_block.norm2", "mid_block.mlp", "mid_block.mlp.fc1", "mid_block.mlp.fc2"]
PARTS += ["out_blocks.0.skip_linear", "label_emb", "final_layer", "mid_block"]
LINEAR = "out_blocks.0.mlp.fc1"
INPUTS = (
    torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([3.0, 900.0]),
    torch.tensor([1, 2]),
)


def network(**changes):
    return tiny(num_classes=5, **changes)


def plain(model):
    """The published formula on the weights that the model has."""
    return published_forward(model.state_dict(), *INPUTS, heads=4, patch=2)


def exchange(model, name, make):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, make(model.get_submodule(name)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_hooks_are_called_and_what_they_return_counts(name, grad):
    model, expected, seen = network(), plain(network()), []
    part = model.get_submodule(name)
    with torch.set_grad_enabled(grad):
        pre = part.register_forward_pre_hook(lambda module, args: seen.append("before"))
        watch = part.register_forward_hook(lambda module, args, out: seen.append("after"))
        torch.testing.assert_close(model(*INPUTS), expected, rtol=1e-4, atol=1e-5)
        assert seen == ["before", "after"] and name in changed(model)
        part.register_forward_hook(lambda module, args, out: out * 1.5)
        assert not torch.allclose(model(*INPUTS), expected, rtol=1e-3)
        part._forward_hooks.popitem()
        pre.remove(), watch.remove()
        assert changed(model) is None and torch.equal(model(*INPUTS), network()(*INPUTS)) and len(seen) == 4


@pytest.mark.parametrize("policy", ["none", "selective", "block"])
def test_backward_hooks_see_gradients_whatever_is_kept(policy):
    model, plain_model, seen = network(activation_checkpointing=policy), network(), []
    for name in PARTS[3:11]:
        model.get_submodule(name).register_full_backward_hook(lambda module, grads, out: seen.append(out[0].shape[-1]))
    model.decoder_pred.register_full_backward_pre_hook(lambda module, out: seen.append(out[0].shape[-1]))
    for each in (model, plain_model):
        each(*INPUTS).square().mean().backward()
    assert sorted(seen) == [12, 32, 32, 32, 32, 32, 32, 96, 128]
    for a, b in zip(model.parameters(), plain_model.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("how", [{"padding_mode": "circular"}, {"dilation": 2}, {"kernel_size": 5}], ids=str)
def test_a_final_convolution_of_another_kind_is_called(how):
    model, last = network(), nn.Conv2d(3, 3, **{"kernel_size": 3, "padding": "same"} | how)
    with torch.no_grad():
        exchange(model, "final_layer", lambda layer: nn.Identity())
        expected = last(model(*INPUTS))
        exchange(model, "final_layer", lambda layer: last)
        torch.testing.assert_close(model(*INPUTS), expected)


def test_hooks_on_all_modules_are_called():
    model, seen = network(), set()
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(module)):
        model(*INPUTS)
        assert changed(model)
    assert {model.get_submodule(name) for name in PARTS} <= seen


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Lora(nn.Module):
    """What adapters do: the layer, wrapped, and a product of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Negated(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Int8Weight(torch.Tensor):
    """What quantisers put in a Linear's place for a weight: a tensor that knows how to multiply."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.as_subclass(torch.Tensor).float() / 100, *bias)
        return super().__torch_function__(func, types, args, kwargs)


def quantised(layer):
    codes = (layer.weight.detach() * 100).round().to(torch.int8)
    layer.weight = nn.Parameter(codes.as_subclass(Int8Weight), requires_grad=False)
    return layer


def of_another_forward(layer):
    layer.forward = lambda x: 3 * F.linear(x, layer.weight, layer.bias)
    return layer


CHANGES = {
    "parametrization": (
        lambda old: nn.utils.parametrize.register_parametrization(old, "weight", Doubled()),
        lambda w: 2 * w,
    ),
    "weight_norm": (parametrizations.weight_norm, lambda w: w),
    "pruned": (lambda old: prune.l1_unstructured(old, "weight", 0.5), lambda w: w * (w.abs() > w.abs().median())),
    "wrapped": (Lora, None),
    "a subclass": (lambda old: Negated(old.in_features, old.out_features), None),
    "quantised": (quantised, lambda w: (w * 100).round() / 100),
    "another forward": (of_another_forward, None),
}


@pytest.mark.parametrize("name", [LINEAR, "mid_block.attn.qkv", "out_blocks.1.skip_linear", "decoder_pred"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_linear_is_called(change, name):
    """Against the formula on the weights that the change means, or against what the changed layer was seen to give."""
    make, means = CHANGES[change]
    model, calls = network(), []
    exchange(model, name, make)
    with torch.no_grad():
        got = model(*INPUTS)
        if means is not None:
            reference = network()
            weight = reference.get_submodule(name).weight
            weight.copy_(means(weight))
            torch.testing.assert_close(got, plain(reference), rtol=1e-3, atol=1e-4)
        assert (change == "weight_norm") == torch.allclose(got, network()(*INPUTS), rtol=1e-4, atol=1e-5)
        model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(model(*INPUTS), got) and calls == [1]


def test_what_wraps_the_network_of_others_is_named():
    wrapper = type("PeftModel", (nn.Sequential,), {"__module__": "peft.peft_model"})
    assert changed(wrapper(network())) == "the network is a peft.peft_model.PeftModel"


def test_gradients_reach_adapters_and_not_what_is_frozen():
    model = network().requires_grad_(False)
    for name in ("mid_block.attn.qkv", LINEAR):
        exchange(model, name, Lora)
    model(*INPUTS).square().mean().backward()
    adapters = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(adapters) == 4 and all(".up." in n or ".down." in n for n in adapters)


def test_other_attention_and_mlps_and_norms_take_their_places():
    model = network()
    model.mid_block.mlp = nn.Sequential(nn.Linear(32, 7), nn.ReLU(), nn.Linear(7, 32))
    model.mid_block.attn = nn.Identity()
    model.in_blocks[0].norm1 = nn.LayerNorm(32, eps=0.1)  # the same class, another formula
    model.in_blocks[1].norm2 = nn.LayerNorm(32, elementwise_affine=False)
    model.out_blocks[0].mlp.fc2 = nn.Linear(128, 32, bias=False)
    x = torch.randn(2, 17, 32)
    mid, first = model.mid_block, model.in_blocks[0]
    h = x + mid.norm1(x)
    torch.testing.assert_close(mid(x), h + mid.mlp(mid.norm2(h)))
    h = x + first.attn(F.layer_norm(x, (32,), eps=0.1))
    torch.testing.assert_close(first(x), h + first.mlp(first.norm2(h)))
    assert model(*INPUTS).shape == (2, 3, 8, 8)


class Scaled(nn.Module):
    """Wraps a block as its caller sees it: (x, skip) -> (B, L, D)."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, skip=None):
        return self.block(x, skip) * 1.5


@pytest.mark.parametrize("name", ["in_blocks.0", "mid_block", "out_blocks.1"])
def test_a_wrapped_block_is_called_as_a_block(name):
    hooked, wrapped = network(), network()
    hooked.get_submodule(name).register_forward_hook(lambda module, args, out: out * 1.5)
    exchange(wrapped, name, Scaled)
    assert torch.equal(wrapped(*INPUTS), hooked(*INPUTS))


def test_where_fused_kernels_are_insisted_on_a_change_is_refused():
    model = network(kernels="fused")
    model.mid_block.attn.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="model.kernels=fused: a block was changed"):
        model.mid_block(torch.randn(2, 17, 32))


def test_compiled_and_exported_networks_call_what_was_changed():
    model = network()
    model.mid_block.attn.qkv.register_forward_hook(lambda module, args, out: out * 2)
    exchange(model, LINEAR, Lora)
    expected = model(*INPUTS)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*INPUTS), expected)
    torch.testing.assert_close(torch.export.export(model, INPUTS).module()(*INPUTS), expected)


def test_export_takes_any_batch_and_tracing_names_it():
    B, model = torch.export.Dim("B", min=2, max=64), network()
    program = torch.export.export(model, INPUTS, dynamic_shapes=[{0: B}] * 3)
    x, t, y = torch.randn(5, 3, 8, 8), torch.rand(5) * 999, torch.arange(5)
    torch.testing.assert_close(program.module()(x, t, y), model(x, t, y))
    with pytest.raises(ValueError, match="expected torch.export.export"):
        torch.jit.trace(model, INPUTS)
