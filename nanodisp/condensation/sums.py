"""Streaming sums over the tokens of a layer, from which all of its figures are computed.

The largest is an F x F matrix, whatever the number of tokens. The sums are in float64, so that a
singular value down to 1e-7 of the largest one is correct.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp.errors import UserError

BINS = 128  # of the histogram, over [-1, 1]
STRIPE = 128  # rows of a symmetric matrix that are added to at a time


class LayerSums:
    """The sums of one layer."""

    def __init__(self, n_features: int, device: torch.device, include_diagonal: bool) -> None:
        self.include_diagonal = include_diagonal
        self.windows = self.tokens = self.pairs = 0
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        # sums of: cosines, their squares, windows' ratios of frequencies
        self.cosine, self.cosine_squared, self.ratio = torch.zeros(3, dtype=torch.float64, device=device)
        self.token = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(n_features, n_features, dtype=torch.float64, device=device)  # of x x^T, upper triangle
        # of single values: sums of their powers 1 to 4, the largest, and the sum of the windows' medians, of |x|
        self.powers = torch.zeros(4, dtype=torch.float64, device=device)
        self.largest, self.median = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, z: Tensor) -> None:
        """Add the tokens z [B, N, F], of a floating dtype."""
        self.rounding = torch.finfo(z.dtype).eps
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        n_windows, n_tokens, n_features = z.shape
        self.windows += n_windows
        self.tokens += n_windows * n_tokens
        self._add_cosines(z)

        x = z.double()
        window_mean = x.mean(dim=1)  # [B, F]
        low = n_tokens * window_mean.square().sum(dim=1)  # [B]: squared norm of the part of frequency 0
        high = x.square().sum(dim=(1, 2)) - low
        self.ratio += (high.clamp(min=0) / low).sqrt().sum()
        self.token += n_tokens * window_mean.sum(dim=0)
        square = x.square()
        self.powers += torch.stack([x.sum(), square.sum(), (square * x).sum(), square.square().sum()])
        size = x.abs().flatten(1)  # [B, N * F]
        self.largest, self.median = torch.maximum(self.largest, size.max()), self.median + size.median(dim=1)[0].sum()
        x = x.view(-1, n_features)
        for start in range(0, n_features, STRIPE):  # symmetric: the blocks on and above the diagonal are enough
            stop = start + STRIPE
            self.outer[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def _add_cosines(self, z: Tensor) -> None:
        """Each pair is counted in both orders: as fast as masking half of the matrix, and simpler."""
        n_windows, n_tokens, _ = z.shape
        u = nn.functional.normalize(z, dim=-1)
        cosines = (u @ u.mT).clamp_(-1, 1)  # [B, N, N]
        itself = (u != 0).any(dim=-1).to(u.dtype)  # [B, N]: 1, or 0 for a zero token
        cosines.diagonal(dim1=1, dim2=2).copy_(itself)
        bins = lambda c: torch.bincount(((c + 1) * (BINS / 2)).int().clamp_(max=BINS - 1).flatten(), minlength=BINS)  # noqa: E731
        self.pairs += n_windows * n_tokens * n_tokens
        self.counts += bins(cosines)
        self.cosine += cosines.sum(dtype=torch.float64)
        self.cosine_squared += torch.linalg.vector_norm(cosines, dtype=torch.float64).square()
        if not self.include_diagonal:
            self.pairs -= n_windows * n_tokens
            self.counts -= bins(itself)
            self.cosine -= itself.sum(dtype=torch.float64)
            self.cosine_squared -= itself.sum(dtype=torch.float64)  # they are 0 or 1

    def principal(self, k: int) -> Tensor:
        """The first k principal directions of the tokens, not centred: float64 [F, k]; UserError unless k < F."""
        if not k < len(self.outer):
            raise UserError(f"without={k} directions leaves nothing of the model's {len(self.outer)}: give fewer")
        return torch.linalg.eigh(self.outer, UPLO="U").eigenvectors[:, -k:]  # ascending

    def finish(self) -> dict[str, Any]:
        """The layer's entries of `Condensation`."""
        mean = self.cosine.item() / self.pairs
        outer, token = self.outer.cpu(), self.token.cpu()
        with np.errstate(divide="ignore", invalid="ignore"):  # a layer of zeros has no spectrum: NaN
            sigma = np.sqrt(_eigenvalues(outer, self.tokens))
            p = sigma[sigma > 0] / sigma.sum()
            entropy = -np.sum(p * np.log(p)) if len(p) else math.nan
            covariance = (outer - torch.outer(token, token) / self.tokens) / (self.tokens - 1)
            mean_square = outer.trace().item() / self.tokens
            spread = _eigenvalues(covariance, self.tokens - 1, floor=self.rounding**2 * mean_square)
            full = len(spread) == len(token)
            return {
                "mean": mean,
                "std": math.sqrt(max(0.0, self.cosine_squared.item() / self.pairs - mean**2)),
                "histogram": self.counts.cpu().numpy() / self.pairs * (BINS / 2),
                "effective_rank": np.exp(entropy),
                "entropy": entropy,
                "explained": sigma.max() ** 2 / np.sum(sigma**2),
                "frequency_ratio": self.ratio.item() / self.windows,
                "condition": spread.max() / spread.min() if full else math.inf,
                "variance": covariance.diagonal().clamp(min=0).numpy(),
                "kurtosis": self._kurtosis(),
                "outlier": np.float64(self.largest.item()) / (self.median.item() / self.windows),
            }

    def _kurtosis(self) -> np.float64:
        """The fourth central moment of all values over their squared variance."""
        m1, m2, m3, m4 = (self.powers / (self.tokens * len(self.token))).cpu().numpy()
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / (m2 - m1**2) ** 2


def _eigenvalues(matrix: Tensor, rank: int, floor: float = 0.0) -> np.ndarray:
    """Eigenvalues of a positive semi-definite matrix [F, F] (its upper triangle) of at most this `rank`.

    Those that may be due to rounding alone are 0: rounding of the sums, and of the tokens, which is up to `floor`.
    """
    values = torch.linalg.eigvalsh(matrix, UPLO="U").numpy()[-rank:]  # ascending
    floor = max(floor, len(matrix) * np.finfo(np.float64).eps * values.max())
    return np.where(values > floor, values, 0.0)
