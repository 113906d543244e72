"""Folded weights that are kept: folded again where a weight changed, whatever wrote it, and left alone elsewhere."""

import pytest
import torch

from uvit_fast.kernels.layernorm import fold, refold
from uvit_fast.kernels.layers import Linear, Norm

pytestmark = pytest.mark.interpreter
WIDTHS, ROWS = (64, 192), (40, 24)  # one power of two and the sum of two; rows that fill no group


class Layers:
    """Two linear layers after a LayerNorm, one without a bias, and what was derived of them."""

    def __init__(self, D: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.x, gamma, beta = (torch.randn(*shape).to(dtype) for shape in ((5, D), (D,), (D,)))
        self.norm = Norm(gamma, beta)
        w1, w2, b2 = (torch.randn(*shape).to(dtype) for shape in ((ROWS[0], D), (ROWS[1], D), (ROWS[1],)))
        self.linears, self.scales = (Linear(w1), Linear(w2, b2)), (1.0, 0.5)
        self.weights = (gamma, beta, w1, w2, b2)
        self.derived = refold.Derived()
        with self.derived.open() as held:
            self.kept = self.fold()
            self.again = self.derived.refresh(held)
        self.again()

    def fold(self) -> list[torch.Tensor]:
        made = [fold.prepare(self.x, self.norm, linear, scale=s) for linear, s in zip(self.linears, self.scales)]
        return [t for folded in made for t in folded.linear]

    def right(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.kept, self.fold(), strict=True))


@pytest.mark.parametrize("D", WIDTHS)
def test_a_change_is_seen_wherever_it_is(D):
    layers = Layers(D, torch.float16)
    assert layers.right()
    narrow, wide = (linear.weight for linear in layers.linears)
    swapped = torch.tensor([5, 4])
    changes = [
        lambda: [w.data[..., -1].neg_() for w in layers.weights[2:]],  # the sign alone; no version tells
        lambda: layers.norm.weight.data[0].add_(1),
        lambda: layers.norm.bias.data[-1].add_(1),
        lambda: narrow[-1, 3].add_(1),
        lambda: wide.index_copy_(0, torch.tensor([4, 5]), wide[swapped]),
        lambda: [w.zero_() for w in layers.weights],
    ]
    for change in changes:
        change()
        layers.again()
        assert layers.right()


def test_nothing_is_written_where_nothing_changed():
    layers = Layers(128, torch.float16)
    for kept in layers.kept:
        kept.fill_(7)
    layers.linears[0].weight[-1, 0] += 1  # in the second group of two
    layers.again()
    groups = layers.kept[0].split(refold.GROUP)
    assert (groups[0] == 7).all() and not (groups[1] == 7).any() and all((kept == 7).all() for kept in layers.kept[2:])


def test_it_follows_weights_and_no_copies_of_them():
    layers = Layers(128, torch.float16)
    assert layers.derived.follows(layers.weights) and not layers.derived.follows(layers.weights[1:])
    assert layers.derived.bytes == sum(t.nbytes for t in layers.kept) + (2 + 1) * 4 * 8
