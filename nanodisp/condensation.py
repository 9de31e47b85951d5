"""Measuring embedding condensation: how far the tokens of a sequence have turned into one cone.

The measure is the mean cosine similarity of all pairs of different tokens of a sequence,
layer by layer, from the embedding on: near 1 is condensed, near 0 is spread out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_cosine(z: Tensor) -> Tensor:
    """Mean over pairs i != j of cos(z_i, z_j), and over sequences: [B, N, F] -> float32 scalar.

    No N x N matrix is needed: sum_ij u_i . u_j = |sum_i u_i|^2. A zero token has cosine 0 with all.
    """
    u = torch.nn.functional.normalize(z.float(), dim=-1)  # [B, N, F]
    n_tokens = z.size(1)
    all_pairs = u.sum(dim=1).square().sum(dim=-1)  # [B], the diagonal included
    diagonal = u.square().sum(dim=(1, 2))
    return ((all_pairs - diagonal) / (n_tokens * (n_tokens - 1))).mean()
