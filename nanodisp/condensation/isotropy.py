"""How evenly tokens use the directions of their space: measures of a spectrum, and of the tokens of a window.

Of eigenvalues l of the tokens' covariance, in any order and of any scale (float64 [F]; a spectrum of zeros gives NaN):
`participation_ratio`, `isoscore`, `nesum`, `spectrum_slope`. Of singular values: `effective_rank`. Of hidden states:
`isoscore_star`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from nanodisp.condensation.cosine import exact
from nanodisp.dispersion.formulas import SHRINKAGE

SLOPE_RANKS = (11, 500)  # of the eigenvalues that the slope is fitted to, as in Stringer et al. (2019)


def participation_ratio(l: np.ndarray) -> float:  # noqa: E741
    """(sum l)^2 / sum l^2: 1 for a line, F for equal variance in all directions; Gao et al., doi 10.1101/214262."""
    with np.errstate(invalid="ignore"):
        return float(np.sum(l) ** 2 / np.sum(np.square(l)))


def isoscore(l: np.ndarray) -> float:  # noqa: E741
    """IsoScore, arXiv 2108.07344: 0 for a line, 1 for equal variance in all directions; NaN for F = 1.

    The paper's steps (normalise l to the length sqrt(F), measure the distance from a vector of ones, rescale twice)
    reduce to (participation ratio - 1) / (F - 1).
    """
    return (participation_ratio(l) - 1) / (len(l) - 1) if len(l) > 1 else math.nan


def nesum(l: np.ndarray) -> float:  # noqa: E741
    """sum l / max l, the normalised eigenvalue sum: 1 to F; He and Ozay, ICML 2022."""
    with np.errstate(invalid="ignore"):
        return float(np.sum(l) / np.max(l))


def spectrum_slope(l: np.ndarray) -> float:  # noqa: E741
    """alpha of l_i ~ i^-alpha, alpha-ReQ, openreview ii9X4vtZGTZ (2022); NaN with fewer than two positive eigenvalues.

    Least squares of log l_i against log i with weights 1/i, so that equal factors of rank weigh the same, over the
    ranks 11 to 500: Stringer et al., doi 10.1038/s41586-019-1346-5. With at most 22 positive eigenvalues from rank 1.
    """
    positive = np.sort(l[l > 0])[::-1]
    first = SLOPE_RANKS[0] if len(positive) > 2 * SLOPE_RANKS[0] else 1
    ranks = np.arange(first, min(len(positive), SLOPE_RANKS[1]) + 1)
    if len(ranks) < 2:
        return math.nan
    x, y, weight = np.log(ranks), np.log(positive[ranks - 1]), 1 / ranks
    x = x - np.average(x, weights=weight)
    return -float(np.sum(weight * x * y) / np.sum(weight * x * x))


def entropy(sigma: np.ndarray) -> float:
    """-sum p ln p of p = sigma / sum sigma, in nats; NaN for zeros."""
    positive = sigma[sigma > 0]
    p = positive / positive.sum()
    return -float(np.sum(p * np.log(p))) if len(p) else math.nan


def effective_rank(sigma: np.ndarray) -> float:
    """exp(entropy) of singular values; Roy and Vetterli, "The effective rank" (2007)."""
    return math.exp(entropy(sigma))


def isoscore_star(z: Tensor) -> Tensor:
    """IsoScore* of each window's tokens, arXiv 2305.19358: [B, N, F] -> [B]; NaN if all tokens are equal, or F = 1.

    IsoScore of (1 - zeta) Cov + zeta m I, zeta = 0.2 and m = trace(Cov) / F: one minus the loss `istar` of
    `nanodisp.dispersion`, which says why m I. With P the participation ratio of Cov, that of the shrunk matrix is
    1 / ((1 - zeta)^2 / P + (1 - (1 - zeta)^2) / F), so that the sum of squares of Cov is enough. Under autocast the
    products are rounded like the model's own.
    """
    x = exact(z)
    n_tokens, n_features = x.shape[1:]
    x = x - x.mean(dim=1, keepdim=True)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # trace 1
    products = x @ x.mT if n_tokens < n_features else x.mT @ x  # the smaller one, with the same eigenvalues
    kept = (1 - SHRINKAGE) ** 2
    squares = torch.linalg.vector_norm(products, dim=(1, 2), dtype=x.dtype).square()
    return (1 / (kept * squares + (1 - kept) / n_features) - 1) / (n_features - 1)
