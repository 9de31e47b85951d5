"""Affine maps of embeddings that undo anisotropy, fitted on other texts than those that are compared.

- raw: none;
- centred: the mean of the texts is subtracted;
- top removed: also the first principal directions, F / 100 of them and at least one: Mu & Viswanath, "All-but-the-Top",
  arXiv 1702.01417;
- whitened: centred, and scaled so that the covariance is the identity: Su et al., "Whitening Sentence Representations",
  arXiv 2103.15316, with all directions that have variance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TRANSFORMS = ("raw", "centred", "top removed", "whitened")
SMALLEST = 1e-6  # of the largest variance: a direction with less is rounding, such as the mean after a LayerNorm


class Transform(NamedTuple):
    """x -> (x - mean) @ matrix; mean [F], matrix [F, F] or None for the identity."""

    mean: Tensor
    matrix: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [n, F] -> float32 [n, F]."""
        x = x - self.mean
        return x if self.matrix is None else x @ self.matrix


def fit(x: Tensor | None, n_features: int) -> dict[str, Transform]:
    """All of `TRANSFORMS` from the vectors x [n, F] of held-out texts, n at least 2; only "raw" if x is None.

    Whitening needs several times as many texts as features, or it enlarges noise.
    """
    raw = {"raw": Transform(torch.zeros(n_features), None)}
    if x is None:
        return raw
    x = x.double()
    mean = x.mean(dim=0)
    variances, directions = torch.linalg.eigh(torch.cov(x.T))  # ascending
    top = directions[:, -max(1, round(n_features / 100)) :]  # [F, k]
    kept = variances > SMALLEST * variances[-1]
    scale = torch.where(kept, variances.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return raw | {
        "centred": Transform(mean.float(), None),
        "top removed": Transform(mean.float(), (torch.eye(n_features).double() - top @ top.T).float()),
        "whitened": Transform(mean.float(), (directions * scale).float()),
    }
