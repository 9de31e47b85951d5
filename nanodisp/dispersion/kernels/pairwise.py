"""Mathematics shared by the CPU and GPU kernels of the pairwise-cosine family.

Every member is a function of S = sum_{i!=j} w(c_ij) over the cosines of one sequence, and its
gradient with respect to u_i is a factor, known once S is, times sum_{j!=i} h(c_ij) u_j:

    variant            s                w          h                    loss
    angular            arcsin(c~) / pi  exp(s/tau) w / sqrt(1 - c~^2)   log(S / P) - 1 / (2 tau)
    orthogonalization  arcsin(c~) / pi  max(0,s)^2 s+ / sqrt(1 - c~^2)  S / P
    cosine             c                exp(s/tau) w                    log(S / P)

with P = N (N - 1) pairs, c~ the clamped cosine and s+ = max(0, s). The angle D = arccos(c~) / pi of the
formulas is 1/2 - s. Centred this way, w stays within exp(+-0.5 / tau), so no maximum has to be subtracted first
and w, S and the sum over h u are computed in one pass.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

FAMILY = ("angular", "orthogonalization", "cosine")

SMALLEST_CLAMP = 0.1  # of the polynomials for arcsin
LARGEST_EXPONENT = 40.0  # exp(40), its square and its inverse fit float32 with a factor of 10^3 to spare


@functools.cache
def arcsin_coefficients(clamp: float, exact: bool = True) -> tuple[float, ...]:
    """a_0.. with arcsin(c) = c * sum_k a_k c^(2k) on the clamped band |c| <= 1 - clamp, for a clamp of at least 0.1.

    A Chebyshev fit in c^2, as short as suits the band: arcsin has its singularity at 1. Its error relative to arcsin is
    below 2e-7, and in float32 below 1e-6 (degree 7, and 11 for a clamp below 0.25); where it need not be `exact`, as of
    cosines of bfloat16 operands, 1.4e-4 (degree 3, and 5).
    """
    degree = (7 if exact else 3) if clamp >= 0.25 else (11 if exact else 5)
    fit = np.polynomial.Chebyshev.interpolate(
        lambda squared: np.arcsin(np.sqrt(squared)) / np.sqrt(squared), degree, domain=[0, (1 - clamp) ** 2]
    )
    return tuple(float(a) for a in fit.convert(kind=np.polynomial.Polynomial).coef)


def slope_at_edge(variant: str, tau: float, clamp: float) -> float:
    """h at the upper edge of the clamped band, where it is largest (1 for cosine, which has no band).

    All pairs of condensed tokens are there. Divided by this, their h is 1 and survives rounding.
    """
    if variant == "cosine":
        return 1.0
    s = math.asin(1 - clamp) / math.pi
    w = math.exp(s / tau) if variant == "angular" else s
    return w / math.sqrt(1 - (1 - clamp) ** 2)


def smallest_tau(variant: str, clamp: float) -> float:
    """The temperature below which exp(s / tau) overflows float32 (0 for orthogonalization, which has none)."""
    largest_s = {"angular": math.asin(1 - clamp) / math.pi, "cosine": 1.0, "orthogonalization": 0.0}
    return largest_s[variant] / LARGEST_EXPONENT


def constants_of_loss(variant: str, tau: float, n_tokens: int) -> tuple[bool, float, float]:
    """What turns S of one sequence into its loss and into the factor k from sum_j h_ij u_j to dloss/du_i.

    Returns (logarithmic, factor, offset): the loss is log(S / P) - offset and k = factor / S if logarithmic, else
    the loss is S / P and k = factor. Each unordered pair counts twice in S, hence the 2 in the factors.
    """
    if variant == "orthogonalization":
        return False, 4 / math.pi / (n_tokens * (n_tokens - 1)), 0.0
    if variant == "cosine":
        return True, 2 / tau, 0.0
    return True, 2 / (math.pi * tau), 1 / (2 * tau)


def loss_and_factor(total: Tensor, variant: str, tau: float, n_tokens: int) -> tuple[Tensor, Tensor]:
    """S of each sequence [B] -> its loss [B], and the factor k [B] from sum_j h_ij u_j to dloss/du_i."""
    logarithmic, factor, offset = constants_of_loss(variant, tau, n_tokens)
    mean = total / (n_tokens * (n_tokens - 1))
    if logarithmic:
        return mean.log() - offset, factor / total
    return mean, total.new_full(total.shape, factor)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the saved dz for a z of this dtype: the same, but bfloat16 for float16.

    dz is saved before it is multiplied by the incoming gradient, which carries the loss scale of float16
    training: unscaled it would underflow float16.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype
