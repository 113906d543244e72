"""What FP8 costs by arithmetic alone: quantising, the LayerNorm's fold, the order of features, a block; in plain
PyTorch.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels import fp8_cases as cases
from uvit_fast.kernels.gemm import fp8
from uvit_fast.kernels.layernorm import added, fold
from uvit_fast.kernels.layers import Linear, Quantised
from uvit_fast.kernels.ops import attention, fp8_block, linear_residual, ln_linear, ln_mlp, skip_linear
from uvit_fast.kernels.quantise import (
    E4M3,
    LARGEST,
    Inputs,
    balanced,
    compensated,
    narrow,
    paired,
    quantise,
    rounded,
    scaled,
    two_parts,
    two_sources,
    unseen,
)

QUANTISED = 0.04  # of a product's norm: two operands, each off by 2.6% of itself at random


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_a_weight_is_off_by_a_sixteenth_of_itself_at_most_in_rows_of_any_scale():
    torch.manual_seed(0)
    weight = torch.randn(6, 4096) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 0.0, 1e-30])[:, None]
    values, (_, scale) = quantise(Linear(weight))
    back = values.float() * scale[:, None]
    least = 2**-10 * scale[:, None]  # half a step of the smallest values
    assert ((back - weight).abs() <= weight.abs() / 16 + least).all()
    assert back.isfinite().all()


def test_values_past_the_largest_are_the_largest():
    assert narrow(torch.tensor([1e4, -1e4, 449.0])).float().tolist() == [448, -448, 448]


@pytest.mark.parametrize("N, K", [(33, 64), (128, 512), (40, 1152)])
def test_balanced_rows_sum_up_to_next_to_nothing_at_no_cost(N, K):
    torch.manual_seed(0)
    x = torch.randn(N, K) * torch.rand(N, 1) * (0.01 + torch.randn(N, K) ** 2)  # of all sizes
    x = x - x.mean(1, keepdim=True)
    x = x * (LARGEST / x.abs().amax(1, keepdim=True))
    nearest, found = narrow(x).float(), balanced(x).float()
    assert found.sum(1).norm() < nearest.sum(1).norm() / (10 if K == 64 else 50)
    assert off(found, x) < (1.03 if K == 64 else 1.005) * off(nearest, x)
    assert ((found - x).abs() <= (x.abs() / 8).clamp(min=2**-9)).all(), "the nearest value or the one beyond"
    assert torch.equal(balanced(torch.zeros(2, K)).float(), torch.zeros(2, K))


@pytest.mark.parametrize("mean", [0.3, 8.0, 100.0])
def test_the_mean_of_a_token_does_not_show_through_the_fold(mean):
    torch.manual_seed(0)
    norm, linear = cases.norm(512), cases.linear(768, 512)
    x = (torch.randn(64, 512) + mean).bfloat16()
    exact = ln_linear.reference(x.float(), norm, Linear(*(t.float() for t in linear)))
    values, (bias, scale) = quantise(linear, norm)
    rstd = cases.statistics(x)[1, :64, None]
    got = x.float() @ values.float().t() * scale * rstd + bias  # x is not quantised: its own error grows with the mean
    assert off(got, exact) < QUANTISED


def spread(M: int, K: int, mean: float) -> torch.Tensor:
    """Return inputs (M, K) as a network's are: correlated, with features of different means."""
    few = torch.randn(M, 8) @ torch.randn(8, K)
    return few + 0.3 * torch.randn(M, K) + mean * torch.randn(K)


@pytest.mark.parametrize("folded", [False, True])
def test_weights_rounded_for_their_inputs_err_less_on_others_like_them(folded):
    """Also with a LayerNorm folded in, whose weights meet the mean of a token."""
    torch.manual_seed(0)
    linear, x = cases.linear(96, 192), narrow(spread(3000, 192, 0.5))
    layer = scaled(linear, cases.norm(192) if folded else None)
    rstd = torch.rand(3000) + 0.5 if folded else None
    half = unseen(192, x.device).plus(x[:1000], None if rstd is None else rstd[:1000])
    half = half.plus(x[1000:1500], None if rstd is None else rstd[1000:1500])
    (found,) = compensated([layer], [half])
    others = x[1500:].float() * (1 if rstd is None else rstd[1500:, None])

    def error(made: Quantised) -> torch.Tensor:
        bias, step = made.rows
        return others @ (made.weight.float() - layer.weight).t() * step + bias - layer.rows[0]  # (1500, N)

    alone = error(rounded(layer))
    assert error(found).norm() < 0.35 * alone.norm()
    assert error(found).mean(0).norm() < 0.1 * alone.mean(0).norm()
    assert found.weight.dtype == E4M3 and torch.equal(found.rows[1], layer.rows[1])


def test_two_parts_of_bf16_hold_twice_its_digits():
    torch.manual_seed(0)
    x = torch.randn(10_000) * torch.logspace(-8, 8, 10_000)
    large, small = two_parts(x)
    assert large.dtype == small.dtype == torch.bfloat16
    assert ((large.double() + small.double() - x).abs() <= 2**-17 * x.abs()).all()


@pytest.mark.parametrize("folded", [False, True])
def test_a_gpu_sums_inputs_in_fp32(folded):
    """By shapes and dtypes alone: the values are a test's that has a GPU."""
    with FakeTensorMode():
        x = torch.empty(500, 192, device="cuda", dtype=E4M3)
        rstd = torch.empty(500, device="cuda") if folded else None
        none = Inputs(0, torch.empty(192, device="cuda"), torch.empty(192, 192, device="cuda"))
        tokens, total, products = none.plus(x, rstd).plus(x, rstd)
    assert (tokens, total.shape, products.shape) == (1000, (192,), (192, 192))
    assert total.dtype == products.dtype == torch.float32 and products.is_cuda


def test_inputs_that_are_all_zero_round_each_weight_by_itself():
    torch.manual_seed(0)
    layer = scaled(cases.linear(16, 64))
    (found,) = compensated([layer], [unseen(64, layer.weight.device).plus(torch.zeros(9, 64, dtype=E4M3), None)])
    assert torch.equal(found.weight.float(), rounded(layer).weight.float()) and torch.equal(found.rows, layer.rows)


def test_layers_are_rounded_together_as_alone_and_gaps_stay_empty():
    torch.manual_seed(0)
    order = two_sources(64, 64, fp8.BK)
    layers = [scaled(cases.linear(16, 128), order=order) for _ in range(2)]
    inputs = []
    for _ in layers:
        x, x2 = narrow(spread(500, 64, 0.5)), narrow(spread(500, 64, 0.5))
        inputs.append(unseen(192, x.device).plus(torch.cat([x, x.new_zeros(500, 64), x2], 1), None))
    together = compensated(layers, inputs)
    for made, *alone in zip(together, layers, inputs):
        assert off(made.weight, compensated([alone[0]], [alone[1]])[0].weight) < 1e-3
        assert (made.weight[:, 64:128].float() == 0).all()


def test_two_sources_begin_at_whole_steps():
    torch.manual_seed(0)
    linear, x, x2 = cases.linear(64, 384), torch.randn(9, 192).bfloat16(), torch.randn(9, 192).bfloat16()
    layer = quantise(linear, order=two_sources(192, 192, fp8.BK))
    assert layer.weight.shape == (64, 256 + 192) and (layer.weight[:, 192:256].float() == 0).all()
    got = fp8.reference("plain", narrow(x), layer, x2=narrow(x2)).wide
    assert off(got, skip_linear.reference(x, x2, linear)) < QUANTISED


def test_features_in_pairs_meet_their_columns():
    order = paired(64)
    assert order[:6].tolist() == [0, 8, 1, 9, 2, 10] and order.sort().values.tolist() == list(range(64))
    torch.manual_seed(0)
    linear, h = cases.linear(8, 64), narrow(torch.randn(5, 64))
    got = fp8.reference("plain", h[:, order], quantise(linear, order=order)).wide
    assert torch.equal(got, fp8.reference("plain", h, quantise(linear)).wide)


@pytest.mark.parametrize("with_skip", [False, True])
def test_a_block_is_off_by_what_quantising_costs(with_skip):
    torch.manual_seed(0)
    B, L, D, H = 2, 17, 128, 2
    norm1, norm2, qkv = cases.norm(D), cases.norm(D), cases.linear(3 * D, D, bias=False)
    proj, fc1, fc2 = cases.linear(D, D), cases.linear(4 * D, D), cases.linear(D, 4 * D)
    skip_layer = cases.linear(D, 2 * D) if with_skip else None
    layers = fp8_block.derive(norm1, qkv, proj, norm2, fc1, fc2, skip_layer, H)
    x, skip = (torch.randn(B * L, D).bfloat16() for _ in range(2))
    full = [Linear(*(None if t is None else t.float() for t in each)) for each in (qkv, proj, fc1, fc2)]
    y = x.float()
    if with_skip:
        y = skip_linear.reference(y, skip.float(), Linear(*(t.float() for t in skip_layer)))
    a = attention.reference(ln_linear.reference(y, norm1, full[0]).view(B, L, 3, H, D // H)).view(B * L, D)
    exact = ln_mlp.reference(linear_residual.reference(a, full[1], y), norm2, *full[2:])
    given = fp8_block.Stream(None, narrow(x)) if with_skip else fp8_block.Stream(x.clone())
    by = fp8_block.REFERENCE
    h = fp8_block.joined(given, narrow(skip), layers, by) if with_skip else given
    made = fp8_block.through_mlp(fp8_block.attended(h, layers, B, H, by), layers, by=by)
    assert off(made.wide, exact) < 0.06
    assert torch.equal(made.narrow.float(), narrow(made.wide).float())
    assert torch.allclose(made.sums[:, 0].sum(0), made.wide.float().sum(1), rtol=1e-4, atol=1e-3)


def test_sums_take_the_place_of_statistics_for_the_products_that_take_them():
    """A calibration, which needs rstd, has them measured all the same."""
    torch.manual_seed(0)
    B, L, D, H = 2, 17, 128, 2
    norm, qkv, proj, fc1, fc2 = (
        cases.norm(D),
        *(cases.linear(n * D, k * D) for n, k in ((3, 1), (1, 1), (4, 1), (1, 4))),
    )
    layers, x = fp8_block.derive(norm, qkv, proj, norm, fc1, fc2, None, H), torch.randn(B * L, D).bfloat16()
    given = fp8_block.Stream(*fp8.reference("residual", narrow(x), layers.proj, side=x, narrow=True, sums=True))
    measured, plain = [], fp8_block.REFERENCE

    def block(by):
        measured.clear()
        by = by._replace(statistics=lambda *of: measured.append(of) or plain.statistics(*of))
        h = fp8_block.attended(given._replace(free=False), layers, B, H, by)
        return fp8_block.through_mlp(h, layers, by=by).wide

    exact = block(plain)
    assert len(measured) == 2
    takes = plain._replace(takes_sums=lambda x, layer: layer is layers.fc1)
    assert off(block(takes), exact) < 1e-3 and len(measured) == 1
    seen = {}
    assert torch.equal(block(fp8_block.watching(takes, seen)), exact) and len(measured) == 2
    assert len(seen) == 4


@pytest.mark.interpreter
@pytest.mark.parametrize("D", [128, 192])  # a power of two, and more than one
def test_statistics_quantise_what_they_read(D):
    torch.manual_seed(0)
    x = narrow(torch.randn(5, D) + 0.3).float()  # values that e4m3 holds: the interpreter rounds others as no GPU does
    made8 = torch.zeros(5, D, dtype=E4M3)
    stats = fold.statistics(x, None, made8)
    assert torch.allclose(stats[:, :5], cases.statistics(x)[:, :5], rtol=1e-5)
    assert torch.equal(made8.float(), narrow(x).float())


@pytest.mark.interpreter
@pytest.mark.parametrize("D", [128, 192])
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_are_added_in_one_pass(D, count):
    torch.manual_seed(0)
    x, *outputs = (torch.randint(-5, 6, (5, D)).bfloat16() for _ in range(1 + count))  # all sums are values of e4m3
    total, stats = x + sum(outputs), None
    for out in (None, torch.zeros_like(x), x):  # not wanted, apart, and in its place
        made8 = torch.zeros(5, D, dtype=E4M3)
        stats = added.add(x, outputs, out, made8)
        assert torch.equal(made8.float(), total.float())
        assert out is None or torch.equal(out, total)
        assert torch.allclose(stats[:, :5], cases.statistics(total)[:, :5], rtol=1e-4)
    x -= sum(outputs)
    assert torch.allclose(added.reference(x, outputs, x, made8), stats[:, :5], rtol=1e-4) and torch.equal(x, total)


def test_gelu_takes_half_its_argument_and_leaves_pairs():
    torch.manual_seed(0)
    epilogue, x, layer, rest = cases.arguments("fc1", 33, 128)
    made = fp8.reference(epilogue, x, layer, **rest)
    h = fp8.reference("plain", x, layer, stats=rest["stats"]).wide.float()
    assert made.wide is None and off(made.narrow, F.gelu(2 * h)[:, paired(512)]) < 0.03
