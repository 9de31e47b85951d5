"""Linear CKA: how alike two representations of the same tokens are, whatever their axes and their scale.

Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv 1905.00414: with the columns of X
[N, F] and Y [N, G] centred over the tokens,

    CKA(X, Y) = |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F),

which is the cosine of the Gram matrices X X^T and Y Y^T. So a state is reduced to its Gram matrix of norm 1 once, and
all pairs of states, over layers, steps and runs, are one matrix product.

With few tokens and many features, CKA is high even of random states. `debiased` replaces the Gram matrices by their
U-centred ones (Székely & Rizzo, arXiv 1310.2926), whose products estimate HSIC without bias (Song et al., "Feature
selection via dependence maximization", 2012; used for CKA by Nguyen et al., arXiv 2010.15327): about 0 for independent
states, below it by chance.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

FEWEST = 4  # tokens that U-centring needs


def cka(x: np.ndarray, y: np.ndarray, *, debiased: bool = False) -> float:
    """CKA of two states of the same N tokens, [N, F] and [N, G]: 0 to 1, and below 0 only if `debiased`.

    NaN if all tokens of a state are the same. Raises ValueError for different tokens, or fewer than 4.
    """
    return float(cka_matrix([x], [y], debiased=debiased)[0, 0])


def cka_matrix(
    xs: Iterable[np.ndarray], ys: Iterable[np.ndarray] | None = None, *, debiased: bool = False
) -> np.ndarray:
    """CKA of every state [N, F] of `xs` with every state [N, G] of `ys` (None: of `xs`), float64 [len(xs), len(ys)].

    Memory is for one N x N matrix per state; see `cka`.
    """
    rows = np.stack([gram(x, debiased=debiased).ravel() for x in xs])
    columns = rows if ys is None else np.stack([gram(y, debiased=debiased).ravel() for y in ys])
    if rows.shape[1] != columns.shape[1]:
        raise ValueError("CKA compares states of the same tokens")
    return rows @ columns.T


def gram(x: np.ndarray, *, debiased: bool = False) -> np.ndarray:
    """The centred Gram matrix of a state [N, F] divided by its Frobenius norm, float64 [N, N]; see the module."""
    n = len(x)
    if n < FEWEST:
        raise ValueError(f"CKA needs at least {FEWEST} tokens, this state has {n}")
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(axis=0)
    k = x @ x.T
    if debiased:
        np.fill_diagonal(k, 0)
        sums = k.sum(axis=0)
        k = k - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0)
    norm = np.linalg.norm(k)
    return k / norm if norm > 0 else np.full_like(k, np.nan)
