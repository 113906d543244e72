"""Linear CKA between representations, in minibatches and unbiased (paper, Appendix E).

CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), after Kornblith et al. 2019. The HSIC of every minibatch is the
unbiased estimate of Song et al. 2012, averaged over minibatches before the division (Nguyen et al. 2021), so that the
result does not depend on the size of a minibatch.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def linear_cka(minibatches: Iterable[list[Tensor]]) -> Tensor:
    """Return the CKA of each pair of representations of the same examples.

    Args:
        minibatches: of M representations each, (N, ...) with any width, N at least 4.

    Returns:
        (M, M) float64 on the CPU; 1 on the diagonal. Being unbiased, it is about 0 for unrelated representations, also
        below.
    """
    sums = [unbiased_hsic(torch.stack([_gram(x) for x in representations])) for representations in minibatches]
    assert sums, "no minibatches"
    hsic = sum(sums[1:], sums[0])
    own = hsic.diagonal().sqrt()
    return (hsic / (own[:, None] * own)).cpu()


def unbiased_hsic(grams: Tensor) -> Tensor:
    """Return the unbiased HSIC of every pair of Gram matrices (Nguyen et al. 2021, Equation 3): (M, N, N) -> (M, M).

    HSIC(K, L) = (tr(K L) + 1'K1 1'L1 / ((N - 1)(N - 2)) - 2 / (N - 2) 1'K L1) / (N (N - 3)), both with a zero diagonal.
    """
    N = grams.shape[1]
    assert N > 3, f"{N} examples: unbiased HSIC needs 4"
    K = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))  # (M, N, N)
    rows = K.sum(2)  # K 1, (M, N)
    totals = rows.sum(1)  # 1'K 1, (M,)
    traces = torch.einsum("aij,bij->ab", K, K)  # tr(K L), as K and L are symmetric
    return (traces + totals[:, None] * totals / ((N - 1) * (N - 2)) - 2 / (N - 2) * rows @ rows.T) / (N * (N - 3))


def _gram(x: Tensor) -> Tensor:
    """Return X X' of (N, ...), (N, N) float64. Centring first changes no HSIC, and keeps large means from costing
    digits.
    """
    x = x.flatten(1).double()
    x = x - x.mean(0)
    return x @ x.T
