"""Mean pairwise cosine of a sequence's tokens, and its trend over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mean_cosine(z: Tensor) -> Tensor:
    """Mean over pairs i != j of cos(z_i, z_j), and over sequences: [B, N, F] -> scalar, float32 or float64 as z.

    No N x N matrix is needed: sum_ij u_i . u_j = |sum_i u_i|^2. A zero token has cosine 0 with every token.
    """
    u = nn.functional.normalize(exact(z), dim=-1)  # [B, N, F]
    n_tokens = z.size(1)
    all_pairs = u.sum(dim=1).square().sum(dim=-1)  # [B], the diagonal included
    diagonal = u.square().sum(dim=(1, 2))
    return ((all_pairs - diagonal) / (n_tokens * (n_tokens - 1))).mean()


def exact(z: Tensor) -> Tensor:
    """z in float32, or in float64 if it is."""
    return z if z.dtype == torch.float64 else z.float()


def trend(layer_means: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau-b of layer means against depth, the embedding being depth 0.

    1: every layer is more condensed than the one before; -1: less. NaN if all are equal.
    """
    from scipy import stats  # here, because the import takes a second and training does not need it

    if len(set(layer_means)) < 2:
        return math.nan, math.nan
    depth = range(len(layer_means))
    return float(stats.spearmanr(depth, layer_means).statistic), float(stats.kendalltau(depth, layer_means).statistic)
