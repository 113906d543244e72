"""The figures against closed forms, against scipy's general square root, and against brute force."""

import numpy as np
import pytest
import scipy.linalg
import torch

from uvit_fast.evaluation.metrics import (
    RunningStatistics,
    Statistics,
    adm_inception_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def statistics_of(features):
    """Mean and unbiased covariance of (N, D) features, in one piece."""
    return Statistics(features.mean(0), torch.cov(features.T))


def random_statistics(rng, dim, count):
    x = rng.gamma(1.0, 0.4, (count, dim)) @ rng.normal(0, 1, (dim, dim)) / dim**0.5  # correlated and not Gaussian
    return statistics_of(torch.from_numpy(x))


def test_frechet_distance_of_diagonal_gaussians():
    """Commuting covariances: |mu|² + sum (s_a - s_b)²."""
    rng = np.random.default_rng(0)
    mu, s_a, s_b = torch.from_numpy(rng.uniform(0.1, 3, (3, 50)))
    a, b = Statistics(torch.zeros(50), torch.diag(s_a**2)), Statistics(mu, torch.diag(s_b**2))
    expected = (mu.square().sum() + (s_a - s_b).square().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """For 2 x 2 matrices tr (A B)^1/2 is sqrt(tr(A B) + 2 sqrt(det A det B)), exactly."""
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root + 5).item()
    assert frechet_distance(Statistics(torch.tensor([1.0, 2.0]), a), Statistics(torch.zeros(2), b)) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("count", [1000, 100])  # 100 samples of 128 dimensions: singular covariances
def test_frechet_distance_equals_the_general_square_root(count):
    rng = np.random.default_rng(count)
    a, b = random_statistics(rng, 128, count), random_statistics(rng, 128, count)
    root = scipy.linalg.sqrtm((a.sigma @ b.sigma).numpy()).real  # as pytorch-fid computes it
    expected = ((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace()).item() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_when_singular():
    a = random_statistics(np.random.default_rng(1), 256, 40)
    assert abs(frechet_distance(a, a)) < 1e-6 * a.sigma.trace().item()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: Statistics(m.mu[:2], m.sigma), "of one D"),
        (lambda m: Statistics(m.mu, m.sigma * float("nan")), "NaN or infinity in a covariance"),
        (lambda m: Statistics(m.mu, m.sigma - 2 * torch.eye(3)), "expected a covariance"),
    ],
)
def test_frechet_distance_refuses_what_are_no_statistics(change, words):
    good = Statistics(torch.zeros(3), torch.eye(3))
    for pair in [(good, change(good)), (change(good), good)]:
        with pytest.raises(ValueError, match=words):
            frechet_distance(*pair)


def test_running_statistics_equal_numpys_far_from_zero():
    """An offset of 1e6 leaves a naive sum of squares four digits; batches of unequal size."""
    x = np.random.default_rng(0).normal(1e6, 1, (257, 6))
    running = RunningStatistics(6)
    for part in np.split(x, [1, 100, 101, 256]):
        running.update(torch.from_numpy(part))
    mu, sigma = running.statistics()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="NaN"):
        running.update(torch.full((1, 6), torch.nan))


def test_inception_score_of_certain_and_of_uniform_predictions():
    """K equally frequent certain classes score K; predictions that are all alike score 1; 0 log 0 is no NaN."""
    certain = torch.eye(8).repeat(10, 1)
    assert inception_score(certain) == pytest.approx(8)
    assert inception_score(torch.full((80, 8), 1 / 8)) == pytest.approx(1)


def score(*splits):
    """Of splits that are given, by its definition."""
    return np.mean([np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in splits])


def labelled(count, classes=10, seed=0):
    """Near-certain predictions of random classes, (N, K), in random order."""
    labels = np.random.default_rng(seed).integers(classes, size=count)
    return torch.from_numpy(np.where(labels[:, None] == np.arange(classes), 0.99, 0.01 / (classes - 1))), labels


def test_inception_score_of_full_splits_in_random_order_is_adms_number():
    """To the digit: 50,000 in the order in which ADM's samples come."""
    p, _ = labelled(50_000, 100)
    assert inception_score(p) == adm_inception_score(p) == pytest.approx(score(*np.split(p.numpy(), 10)), rel=1e-12)
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(5), 25))
    assert adm_inception_score(p, 10) == pytest.approx(score(*np.split(p.numpy(), [10, 20])), rel=1e-12)
    assert inception_score(p[:9], 10) == adm_inception_score(p[:9], 10)  # fewer than a split are one
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(torch.ones(4, 4))


def test_inception_score_counts_no_small_split_and_no_order():
    """A last split of one sample would score 1, splits of one class each as well."""
    p, labels = labelled(10_050)
    expected = inception_score(p[:10_000])
    for count in (10_001, 10_003, 10_050):
        assert inception_score(p[:count]) == pytest.approx(expected, rel=2e-3)
    assert adm_inception_score(p[:10_001]) == pytest.approx((2 * expected + 1) / 3, rel=2e-3)
    p, labels = p[:10_000], labels[:10_000]
    halves = labels % 2 * 100 + np.random.default_rng(1).permutation(10_000) / 1e4  # even classes first, mixed
    for order in (labels, -labels, halves):
        assert inception_score(p[np.argsort(order, kind="stable")]) == pytest.approx(expected, rel=3e-3)


def brute_force(samples, reference, k):
    def radii(x):
        return [sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1] for i in range(len(x))]

    def covered(x, centres, centre_radii):
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, centre_radii)) for p in x]
        return np.mean(inside)

    return (
        covered(samples, reference, radii(reference)),
        covered(reference, samples, radii(samples)),
    )


@pytest.mark.parametrize(("k", "block"), [(3, 1024), (1, 7)])  # 7: blocks that do not divide the sets
def test_precision_recall_equals_brute_force(k, block):
    rng = np.random.default_rng(k)
    reference, samples = rng.normal(0, 1, (60, 4)), rng.normal(0.7, 0.8, (75, 4))
    expected = brute_force(samples, reference, k)
    assert 0.1 < min(expected) and max(expected) < 0.99  # the case decides something
    found = precision_recall(torch.from_numpy(samples), torch.from_numpy(reference), k, block)
    assert found == pytest.approx(expected, abs=1e-12)


def test_precision_recall_of_equal_and_of_distant_sets():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x + 100, x) == (0, 0)
    narrow = precision_recall(x[:1] + 1e-3 * x, x)  # all samples about one reference: precise, of little recall
    assert narrow.precision == 1 and narrow.recall < 0.1
    with pytest.raises(ValueError, match="more than k = 3"):
        precision_recall(x[:3], x)


def test_kernel_distance_equals_the_sums_of_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (12, 3)), rng.normal(1, 1, (12, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 144
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=5)  # subsets of all points
    assert found.mean == pytest.approx(expected, rel=1e-12) and found.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_and_the_seed_decides_it():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2000, 16, generator=generator)
    same = kernel_distance(x, y, size=500)
    assert abs(same.mean) < 3 * same.std and same == kernel_distance(x, y, size=500)
    assert kernel_distance(x + 1, y, size=500).mean > 10 * same.std
