"""Every dispersion formula in plain PyTorch: the definition that the fused kernels are tested against.

Notation: z is the hidden state of one layer, ``[B, N, F]``: B sequences, N tokens, F features. A pair is two
different tokens of the same sequence. u = z / (|z| + 0.01) is a token's direction, c_ij = u_i . u_j the cosine of two
tokens, D_ij = arccos(c_ij) / pi their angle. A formula takes z, the temperature tau and the margin of the clamped
cosines, whether it uses them or not, and returns one loss per sequence, ``[B]``.

Formulas of cosines are exact enough in float32. The others use float64 inside: exp(-|z_i - z_j|^2) of distances in
the hundreds loses four of float32's seven digits, as does the standard deviation of nearly equal numbers.

Sources: Liu et al., "Dispersion Loss Counteracts Embedding Condensation and Improves Generalization in Small Language
Models", arXiv 2602.00217; Wang & He, "Diffuse and Disperse", arXiv 2506.09027; the other formulas name theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NORM_EPS = 1e-2  # in u = z / (|z| + eps)
CLAMP = 0.25  # the default margin: cosines are clamped to [-1 + margin, 1 - margin] before arccos
ENTROPY_EPS = 1e-2  # in log2(p + eps)
L2_PENALTY = 0.1  # weight of mean(z^2) in l2_repel


def angular(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """log( mean_{i!=j} exp(-D_ij / tau) ), arXiv 2602.00217."""
    return _log_mean_exp_of_pairs(-_angles(z, clamp) / tau)


def cosine(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """log( mean_{i!=j} exp(c_ij / tau) ), arXiv 2506.09027 without the diagonal."""
    return _log_mean_exp_of_pairs(_cosines(z) / tau)


def orthogonalization(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """mean_{i!=j} max(0, 1/2 - D_ij)^2: penalises acute angles only. arXiv 2602.00217."""
    return _mean_of_pairs((0.5 - _angles(z, clamp)).clamp(min=0).square())


def decorrelation(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """mean_{i!=j} Cov_ij^2, Cov = Z Z^T / (F - 1), rows of Z standardised. arXiv 2602.00217.

    A row with zero variance (all features equal) has no correlation and is treated as zeros.
    """
    z = z.double()
    n_features = z.size(-1)
    std = z.std(dim=-1, keepdim=True)
    standardised = (z - z.mean(dim=-1, keepdim=True)) / std.where(std > 0, 1.0)
    covariance = standardised @ standardised.mT / (n_features - 1)  # [B, N, N]
    return _mean_of_pairs(covariance.square())


def l2_repel(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """log( mean_{i!=j} exp(-|z_i - z_j|^2 / tau) ) + 0.1 mean(z^2), arXiv 2602.00217.

    The second term keeps the norms from growing without bound.
    """
    z = z.double()
    return _log_mean_exp_of_pairs(-_squared_distances(z) / tau) + L2_PENALTY * z.square().mean(dim=(1, 2))


def entropy(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """-mean_i H_i, H_i = -sum_j p_ij log2(p_ij + 0.01), p_i = softmax_{j!=i}(-|z_i - z_j|^2 / tau).

    From the public code of the authors of arXiv 2602.00217.
    """
    logits = -_squared_distances(z.double()) / tau
    p = logits.masked_fill(_diagonal(logits), -math.inf).softmax(dim=-1)
    return (p * (p + ENTROPY_EPS).log2()).sum(dim=-1).mean(dim=-1)


def variance(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """mean_f max(0, 1 - std_f), std over the tokens: VICReg's variance term, arXiv 2105.04906."""
    return (1 - z.double().std(dim=1)).clamp(min=0).mean(dim=-1)


def logdet(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """-1/(2F) logdet( I + F/(N tau^2) U^T U ): the coding rate of arXiv 2006.08558, negated.

    U^T U [F, F] and U U^T [N, N] give the same determinant; the smaller one is used.
    """
    _, n_tokens, n_features = z.shape
    u = _directions(z.double())
    gram = u @ u.mT if n_tokens < n_features else u.mT @ u
    identity = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(identity + n_features / (n_tokens * tau**2) * gram)
    return -factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1) / n_features  # logdet / 2 = sum log diag


CLAMPED = ("angular", "orthogonalization")  # the formulas of angles
VARIANTS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "angular": angular,
    "orthogonalization": orthogonalization,
    "decorrelation": decorrelation,
    "l2_repel": l2_repel,
    "entropy": entropy,
    "cosine": cosine,
    "variance": variance,
    "logdet": logdet,
}


# --- building blocks of the formulas ---------------------------------------------------


def _directions(z: Tensor) -> Tensor:
    return z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + NORM_EPS)


def _cosines(z: Tensor) -> Tensor:
    u = _directions(z)
    return u @ u.mT  # [B, N, N]


def _angles(z: Tensor, clamp: float) -> Tensor:
    """D = arccos(c) / pi, [B, N, N], with c clamped in value but not in gradient.

    Outside the band the gradient is that at its edge: nearly parallel tokens must still be pushed apart, where plain
    clamping would give no gradient and arccos an infinite one.
    """
    c = _cosines(z)
    clamped = c + (c.clamp(-1 + clamp, 1 - clamp) - c).detach()
    return torch.arccos(clamped) / math.pi


def _squared_distances(z: Tensor) -> Tensor:
    """|z_i - z_j|^2 = |z_i|^2 + |z_j|^2 - 2 z_i . z_j; it cancels, so z should be float64."""
    squared_norm = z.square().sum(dim=-1)
    return squared_norm[:, :, None] + squared_norm[:, None, :] - 2 * z @ z.mT


def _diagonal(pairs: Tensor) -> Tensor:
    return torch.eye(pairs.size(-1), dtype=torch.bool, device=pairs.device)


def _mean_of_pairs(pairs: Tensor) -> Tensor:
    n_tokens = pairs.size(-1)
    return pairs.masked_fill(_diagonal(pairs), 0).sum(dim=(1, 2)) / (n_tokens * (n_tokens - 1))


def _log_mean_exp_of_pairs(logits: Tensor) -> Tensor:
    n_tokens = logits.size(-1)
    total = logits.masked_fill(_diagonal(logits), -math.inf).logsumexp(dim=(1, 2))
    return total - math.log(n_tokens * (n_tokens - 1))
