"""CKA on representations whose similarity is known."""

import pytest
import torch

from uvit_fast.evaluation.cka import linear_cka, unbiased_hsic


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic_in_loops(K: torch.Tensor, L: torch.Tensor) -> float:
    """Song et al. 2012, Equation 5, over distinct examples: E[k12 (l12 + l34 - 2 l13)]."""
    n, total, count = len(K), 0.0, 0
    for i in range(n):
        for j in set(range(n)) - {i}:
            for q in set(range(n)) - {i, j}:
                for r in set(range(n)) - {i, j, q}:
                    total += float(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]))
                    count += 1
    return total / count


def test_hsic_is_the_u_statistic_over_distinct_examples():
    x, y = random(7, 3), random(7, 2, seed=1) + 5
    grams = torch.stack([x @ x.T, y @ y.T])
    ours = unbiased_hsic(grams)
    for a in range(2):
        for b in range(2):
            assert ours[a, b].item() == pytest.approx(hsic_in_loops(grams[a], grams[b]), rel=1e-9)


def test_rotated_scaled_and_shifted_representations_are_the_same():
    x = random(64, 10)
    rotation = torch.linalg.qr(random(10, 10, seed=1))[0]
    cka = linear_cka([[x, 3 * x @ rotation + 100, x.view(64, 2, 5)]])
    torch.testing.assert_close(cka, torch.ones(3, 3, dtype=torch.float64))


def test_unrelated_representations_are_not_similar_however_wide():
    """The biased estimate would give 0.9 here: 1000 features of 64 examples."""
    batches = [[random(64, 1000, seed=2 * i), random(64, 1000, seed=2 * i + 1)] for i in range(8)]
    assert abs(linear_cka(batches)[0, 1]) < 0.05


def test_orthogonal_representations_have_nothing_in_common():
    """p orthonormal, centred features each: tr(K L) is 0, and its diagonal, p^2 / N, is what the unbiased estimate
    takes away.
    """
    N, p = 400, 4
    q = torch.linalg.qr(torch.cat([torch.ones(N, 1).double(), random(N, 2 * p)], dim=1))[0][:, 1:]
    assert linear_cka([[q[:, :p], q[:, p:]]])[0, 1].item() == pytest.approx(-p / N, rel=0.1)


def test_half_shared_is_half_similar():
    """Two of four equal independent features in common: <X'Y> is 2 of sqrt(4 * 4)."""
    x = random(4000, 6)
    assert linear_cka([[x[:, :4], x[:, 2:]]])[0, 1] == pytest.approx(0.5, abs=0.02)


def test_minibatches_give_what_all_examples_at_once_do():
    x = random(4096, 5)
    y = x + random(4096, 5, seed=1)
    whole = linear_cka([[x, y]])[0, 1]
    small = linear_cka([list(pair) for pair in zip(x.split(16), y.split(16))])[0, 1]
    assert small.item() == pytest.approx(whole.item(), abs=0.01)


def test_hsic_is_averaged_before_the_division():
    batches = [[random(8, 3, seed=i), random(8, 3, seed=i) + random(8, 3, seed=9 + i)] for i in range(3)]
    grams = [torch.stack([(z - z.mean(0)) @ (z - z.mean(0)).T for z in pair]) for pair in batches]
    hsic = sum(unbiased_hsic(g) for g in grams)
    expected = hsic[0, 1] / (hsic[0, 0] * hsic[1, 1]).sqrt()
    assert linear_cka(batches)[0, 1].item() == pytest.approx(expected.item(), rel=1e-12)
