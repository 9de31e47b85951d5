"""Streaming sums over the tokens of a layer, from which all of its figures are computed.

The largest is an F x F matrix, whatever the number of tokens. The sums are in float64, so that a
singular value down to 1e-7 of the largest one is correct. `CosineSums` has those of the pairs' cosines alone,
`LayerSums` all that one reading of the windows gives, `SecondSums` what needs the first reading's results.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanodisp.condensation import isotropy
from nanodisp.condensation.cosine import exact, mean_cosine
from nanodisp.condensation.layers import kurtosis
from nanodisp.errors import UserError

BINS = 128  # of the histogram, over [-1, 1]
STRATA = 4  # of tokens by their frequency
STRIPE = 128  # rows of a symmetric matrix that are added to at a time


class CosineSums:
    """Sums of the cosines of all pairs of tokens of a window, in one layer.

    With `positions`, also of the windows' matrices of cosines, entry by entry: float64 [N, N], diagonal included.
    """

    def __init__(self, device: torch.device, include_diagonal: bool, positions: int = 0) -> None:
        self.include_diagonal = include_diagonal
        self.windows = self.tokens = self.pairs = 0
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.cosine, self.cosine_squared = torch.zeros(2, dtype=torch.float64, device=device)
        self.matrix = torch.zeros(positions, positions, dtype=torch.float64, device=device)

    def add(self, z: Tensor, idx: Tensor | None = None) -> None:
        """Add the tokens z [B, N, F], of a floating dtype; idx, which they are, is for `SecondSums`."""
        self._add_cosines(exact(z))

    def _add_cosines(self, z: Tensor) -> Tensor:
        """Each pair is counted in both orders: as fast as masking half of the matrix, and simpler.

        Returns the tokens' directions, [B, N, F].
        """
        n_windows, n_tokens, _ = z.shape
        self.windows += n_windows
        self.tokens += n_windows * n_tokens
        u = nn.functional.normalize(z, dim=-1)
        cosines = (u @ u.mT).clamp_(-1, 1)  # [B, N, N]
        itself = (u != 0).any(dim=-1).to(u.dtype)  # [B, N]: 1, or 0 for a zero token
        cosines.diagonal(dim1=1, dim2=2).copy_(itself)
        self.pairs += n_windows * n_tokens * n_tokens
        self.counts += count_bins(cosines)
        self.cosine += cosines.sum(dtype=torch.float64)
        self.cosine_squared += torch.linalg.vector_norm(cosines, dtype=torch.float64).square()
        if len(self.matrix):
            self.matrix += cosines.sum(dim=0, dtype=torch.float64)
        if not self.include_diagonal:
            self.pairs -= n_windows * n_tokens
            self.counts -= count_bins(itself)
            self.cosine -= itself.sum(dtype=torch.float64)
            self.cosine_squared -= itself.sum(dtype=torch.float64)  # they are 0 or 1
        return u

    def finish(self) -> dict[str, Any]:
        mean = self.cosine.item() / self.pairs
        return {
            "mean": mean,
            "std": math.sqrt(max(0.0, self.cosine_squared.item() / self.pairs - mean**2)),
            "histogram": self.counts.cpu().numpy() / self.pairs * (BINS / 2),
        }


def count_bins(cosines: Tensor) -> Tensor:
    """How many of the values are in each of the `BINS` bins over [-1, 1]: int64 [BINS]."""
    return torch.bincount(((cosines + 1) * (BINS / 2)).int().clamp_(max=BINS - 1).flatten(), minlength=BINS)


class LayerSums(CosineSums):
    """The sums of one layer."""

    def __init__(self, n_features: int, device: torch.device, include_diagonal: bool) -> None:
        super().__init__(device, include_diagonal)
        double: Any = {"dtype": torch.float64, "device": device}
        # sums over windows of: ratios of frequencies, IsoScore*, cosines of pairs without the first token and all of
        # them, twice each; and of the tokens' directions
        self.ratio, self.isoscore_star, self.rest, self.within = torch.zeros(4, **double)
        self.direction = torch.zeros(n_features, **double)
        self.token = torch.zeros(n_features, **double)
        self.outer = torch.zeros(n_features, n_features, **double)  # of x x^T, upper triangle
        # of single values: sums of their powers 1 to 4, the largest, and the sum of the windows' medians, of |x|
        self.powers = torch.zeros(4, **double)
        self.largest, self.median = torch.zeros(2, **double)
        # of each dimension: sums of the powers 1 to 4 of x - shift, which is the mean of the first window
        self.shift: Tensor | None = None
        self.moments = torch.zeros(4, n_features, **double)

    def add(self, z: Tensor, idx: Tensor | None = None) -> None:
        """Add the tokens z [B, N, F], of a floating dtype; idx, which they are, is for `SecondSums`."""
        self.rounding = torch.finfo(z.dtype).eps
        z = exact(z)
        _, n_tokens, n_features = z.shape
        u = self._add_cosines(z).double()
        directions = u.sum(dim=1)  # [B, F]
        self.direction += directions.sum(dim=0)
        self.within += directions.square().sum()
        self.rest += (directions - u[:, 0]).square().sum() - u[:, 1:].square().sum()

        x = z.double()
        window_mean = x.mean(dim=1)  # [B, F]
        low = n_tokens * window_mean.square().sum(dim=1)  # [B]: squared norm of the part of frequency 0
        high = x.square().sum(dim=(1, 2)) - low
        self.ratio += (high.clamp(min=0) / low).sqrt().sum()
        self.isoscore_star += isotropy.isoscore_star(z).sum(dtype=torch.float64)
        self.token += n_tokens * window_mean.sum(dim=0)
        square = x.square()
        self.powers += torch.stack([x.sum(), square.sum(), (square * x).sum(), square.square().sum()])
        size = x.abs().flatten(1)  # [B, N * F]
        self.largest, self.median = torch.maximum(self.largest, size.max()), self.median + size.median(dim=1)[0].sum()
        x = x.view(-1, n_features)
        self.shift = window_mean[0].clone() if self.shift is None else self.shift
        shifted = x - self.shift
        square = shifted.square()
        self.moments += torch.stack([each.sum(dim=0) for each in (shifted, square, square * shifted, square.square())])
        for start in range(0, n_features, STRIPE):  # symmetric: the blocks on and above the diagonal are enough
            stop = start + STRIPE
            self.outer[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def principal(self, k: int) -> Tensor:
        """The first k principal directions of the tokens, not centred: float64 [F, k]; UserError unless k < F."""
        if not k < len(self.outer):
            raise UserError(f"without={k} directions leaves nothing of the model's {len(self.outer)}: give fewer")
        return torch.linalg.eigh(self.outer, UPLO="U").eigenvectors[:, -k:]  # ascending

    def mean_square(self) -> Tensor:
        """Of each dimension: float64 [F]."""
        return self.outer.diagonal() / self.tokens

    def finish(self) -> dict[str, Any]:
        """The layer's entries of `Condensation`, without those of `SecondSums`."""
        outer, token = self.outer.cpu(), self.token.cpu()
        block = self.tokens // self.windows
        pairs_across = self.tokens**2 - self.windows * block**2
        rest = self.windows * (block - 1) * (block - 2)
        with np.errstate(divide="ignore", invalid="ignore"):  # a layer of zeros has no spectrum: NaN
            sigma = np.sqrt(_eigenvalues(outer, self.tokens))
            covariance = (outer - torch.outer(token, token) / self.tokens) / (self.tokens - 1)
            mean_square = outer.trace().item() / self.tokens
            spread = _eigenvalues(covariance, self.tokens - 1, floor=self.rounding**2 * mean_square)
            spectrum = np.zeros(len(token))
            spectrum[: len(spread)] = spread  # with fewer tokens than dimensions, the others are 0
            full = len(spread) == len(token)
            across = self.direction.square().sum().item() - self.within.item()
            return super().finish() | {
                "cosine_across": across / pairs_across if pairs_across else math.nan,
                "cosine_without_first": self.rest.item() / rest if rest else math.nan,
                "effective_rank": isotropy.effective_rank(sigma),
                "entropy": isotropy.entropy(sigma),
                "centred_rank": isotropy.effective_rank(np.sqrt(spectrum)),
                "participation": isotropy.participation_ratio(spectrum),
                "isoscore": isotropy.isoscore(spectrum),
                "isoscore_star": self.isoscore_star.item() / self.windows,
                "nesum": isotropy.nesum(spectrum),
                "spectrum_slope": isotropy.spectrum_slope(spectrum),
                "explained": sigma.max() ** 2 / np.sum(sigma**2),
                "frequency_ratio": self.ratio.item() / self.windows,
                "condition": spread.max() / spread.min() if full else math.inf,
                "variance": covariance.diagonal().clamp(min=0).numpy(),
                "kurtosis": self._kurtosis(),
                "kurtosis_by_dimension": kurtosis(self.moments / self.tokens).cpu().numpy(),
                "outlier": np.float64(self.largest.item()) / (self.median.item() / self.windows),
            }

    def _kurtosis(self) -> float:
        """The fourth central moment of all values over their squared variance."""
        return kurtosis(self.powers[:, None] / (self.tokens * len(self.token))).item()


class SecondSums:
    """What a second reading of the windows adds to one layer, given the sums of the first.

    Args:
        first: this layer's, complete.
        strata: int64 [vocabulary], the stratum of each token by its frequency; None without tokens.
    """

    def __init__(self, first: LayerSums, strata: Tensor | None, without_largest: int) -> None:
        self.mean = first.token / first.tokens
        largest = first.mean_square().topk(min(without_largest, len(self.mean))).indices
        self.kept = torch.ones_like(self.mean).index_fill_(0, largest, 0)
        self.strata, self.windows = strata, 0
        self.centred, self.without_largest = torch.zeros_like(self.mean[:2])
        # of each stratum: cosines of pairs of different tokens, and the number of these pairs
        self.by_frequency, self.pairs = torch.zeros(2, STRATA, dtype=torch.float64, device=self.mean.device)

    def add(self, z: Tensor, idx: Tensor | None) -> None:
        """Add the tokens z [B, N, F], of a floating dtype; idx, int64 [B, N], says which they are."""
        x = z.double()
        self.windows += len(x)
        self.centred += len(x) * mean_cosine(x - self.mean)
        self.without_largest += len(x) * mean_cosine(x * self.kept)
        if self.strata is not None and idx is not None:
            self._add_by_frequency(nn.functional.normalize(x, dim=-1).flatten(0, 1), idx, self.strata)

    def _add_by_frequency(self, u: Tensor, idx: Tensor, strata: Tensor) -> None:
        """sum over pairs of different tokens of a stratum = |sum of all|^2 - sum over tokens |sum of its places|^2."""
        n_windows, vocab_size = len(idx), len(strata)
        window = torch.arange(n_windows, device=idx.device)[:, None]
        in_stratum = (window * STRATA + strata[idx]).flatten()  # [B * N]
        which, place = torch.unique(window * vocab_size + idx, return_inverse=True)
        for sign, group, size in ((1, in_stratum, n_windows * STRATA), (-1, place.flatten(), len(which))):
            sums = u.new_zeros(size, u.size(1)).index_add_(0, group, u).square().sum(dim=1)
            counts = u.new_zeros(size).index_add_(0, group, torch.ones_like(u[:, 0])).square()
            stratum = strata[which % vocab_size] if sign < 0 else torch.arange(size, device=idx.device) % STRATA
            self.by_frequency.index_add_(0, stratum, sign * sums)
            self.pairs.index_add_(0, stratum, sign * counts)

    def finish(self) -> dict[str, Any]:
        """The layer's entries of `Condensation`."""
        return {
            "cosine_centred": self.centred.item() / self.windows,
            "cosine_without_largest": self.without_largest.item() / self.windows,
            "cosine_by_frequency": (self.by_frequency / self.pairs).where(self.pairs > 0, math.nan).cpu().numpy(),
        }


def strata_of(counts: Tensor) -> Tensor:
    """The stratum of each token, int64 [vocabulary], 0 for the most frequent: each holds a quarter of the text.

    counts: int64 [vocabulary], how often each occurs. A token is where the middle of its share falls; those that occur
    equally often are in the order of their numbers.
    """
    order = counts.argsort(descending=True, stable=True)
    share = counts[order].double()
    middle = (share.cumsum(0) - share / 2) / share.sum()
    return torch.empty_like(order).index_copy_(0, order, (middle * STRATA).long().clamp(max=STRATA - 1))


def _eigenvalues(matrix: Tensor, rank: int, floor: float = 0.0) -> np.ndarray:
    """Eigenvalues of a positive semi-definite matrix [F, F] (its upper triangle) of at most this `rank`.

    Those that may be due to rounding alone are 0: rounding of the sums, and of the tokens, which is up to `floor`.
    """
    values = torch.linalg.eigvalsh(matrix, UPLO="U").numpy()[-rank:]  # ascending
    floor = max(floor, len(matrix) * np.finfo(np.float64).eps * values.max())
    return np.where(values > floor, values, 0.0)
