"""Every dispersion formula in plain PyTorch: the definition that the fused kernels are tested against.

Notation: z is the hidden state of one layer, ``[B, N, F]``: B sequences, N tokens, F features. A pair is two
different tokens of the same sequence. u = z / (|z| + 0.01) is a token's direction, c_ij = u_i . u_j the cosine of two
tokens, D_ij = arccos(c_ij) / pi their angle. A formula takes z, the temperature tau and the margin of the clamped
cosines, whether it uses them or not, and returns one loss per sequence, ``[B]``. Cov [F, F] is the covariance of the
features over a sequence's tokens.

Formulas of cosines are exact enough in float32, and so is `sigreg`. The others use float64 inside: exp(-|z_i - z_j|^2)
of distances in the hundreds loses four of float32's seven digits, as does the standard deviation of nearly equal
numbers.

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
MARGIN = 0.5  # rho of simctg
SHRINKAGE = 0.2  # zeta of istar
VARIANCE_EPS = 1e-12  # tokens must not lower a ratio of variances by approaching each other, only equal ones need it
CONDITION_SHIFT = 1e-3  # of condition, times the mean variance
N_SLICES = 64  # directions of sigreg
KNOTS, KNOTS_END = 16, 3  # sigreg compares characteristic functions at 16 points up to 3 (at 0 they are equal)


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


def cosreg(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """1/N^2 sum_{i!=j} c_ij = (|sum_i u_i|^2 - sum_i |u_i|^2) / N^2, arXiv 1907.12009.

    Linear in N: no matrix of pairs.
    """
    u = _directions(z)
    total = u.sum(dim=1).square().sum(dim=-1)  # [B], the sum over all c_ij
    return (total - u.square().sum(dim=(1, 2))) / z.size(1) ** 2


def simctg(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """mean_{i!=j} max(0, 1/2 - c_ii + c_ij): the contrastive loss of SimCTG, arXiv 2202.06417."""
    c = _cosines(z)
    return _mean_of_pairs((MARGIN - c.diagonal(dim1=1, dim2=2)[:, :, None] + c).clamp(min=0))


def feature_decorrelation(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """1/F sum_{f!=g} Cov_fg^2: VICReg's covariance term, arXiv 2105.04906.

    The sum over all f and g is the same for the smaller matrix of `_covariance`, so that the diagonal is subtracted.
    """
    z = z.double()
    variances = z.var(dim=1)  # [B, F]
    return (_covariance(z).square().sum(dim=(1, 2)) - variances.square().sum(dim=-1)) / z.size(-1)


def feature_correlation(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """That of standardised features, z_f / sqrt(Cov_ff + 1e-12): Barlow Twins' redundancy term, arXiv 2103.03230."""
    z = z.double()
    return feature_decorrelation(z / (z.var(dim=1, keepdim=True) + VARIANCE_EPS).sqrt(), tau)


def istar(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """1 - IsoScore* of (1 - zeta) Cov + zeta m I, m = trace(Cov) / F + 1e-12, arXiv 2305.19358.

    The paper's steps from the eigenvalues l to the score reduce to ((sum l)^2 / sum l^2 - 1) / (F - 1), so that trace
    and sum of squares are enough. m I stands in for the covariance of a larger sample. With I alone, which the authors'
    code advises without such a sample, tokens that move together would raise the score.
    """
    z, n_features = z.double(), z.size(-1)
    covariance = _covariance(z)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(dim=-1)
    target, kept = SHRINKAGE * (trace / n_features + VARIANCE_EPS), 1 - SHRINKAGE
    total = kept * trace + target * n_features  # sum l
    squares = kept**2 * covariance.square().sum(dim=(1, 2)) + 2 * kept * target * trace + target**2 * n_features
    return 1 - (total.square() / squares - 1) / (n_features - 1)


def istar_reversed(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """IsoScore*: `istar` with a negative weight, the direction in which its authors found the better fine-tuning."""
    return 1 - istar(z, tau, clamp)


def condition(z: Tensor, tau: float, clamp: float = CLAMP) -> Tensor:
    """log( (l_1 + s) / (l_r + s) ), l the eigenvalues of Cov in falling order and r = min(N - 1, F) its largest rank.

    s = 0.001 trace(Cov) / F + 1e-12 keeps it finite, and its gradient small, for tokens in fewer directions.
    """
    n_tokens, n_features = z.shape[1:]
    covariance = _covariance(z.double())
    mean_variance = covariance.diagonal(dim1=1, dim2=2).sum(dim=-1) / n_features
    shift = CONDITION_SHIFT * mean_variance + VARIANCE_EPS
    # The solver rejects NaN; through `shift` it still reaches the loss.
    eigenvalues = torch.linalg.eigvalsh(covariance.nan_to_num(0.0, 0.0, 0.0))  # [B, min(N, F)], rising
    smallest = eigenvalues[:, -min(n_tokens - 1, n_features)]
    return ((eigenvalues[:, -1] + shift) / (smallest + shift)).log()


def sigreg(z: Tensor, tau: float, clamp: float = CLAMP, slices: Tensor | None = None) -> Tensor:
    """Mean over directions a of N int |mean_i exp(i t a.z_i) - exp(-t^2/2)|^2 exp(-t^2/2) dt, arXiv 2511.08544.

    The Epps-Pulley statistic of the tokens along a, against N(0, 1): 0 for standard normal tokens. The integral from
    -3 to 3 is twice that from 0, by the trapezoidal rule, as in the authors' code.

    Args:
        slices: the directions, [F, any number], unit columns; None for those of `draw_slices` with seed 0.
    """
    if slices is None:
        slices = draw_slices(z.size(-1), torch.Generator().manual_seed(0))
    projected = z @ slices.to(z)  # [B, N, slices]
    step, integral = KNOTS_END / KNOTS, projected.new_zeros(())
    for k in range(1, KNOTS + 1):  # one after the other: no tensor larger than `projected`
        angle, normal = k * step * projected, math.exp(-((k * step) ** 2) / 2)
        error = (angle.cos().mean(dim=1) - normal).square() + angle.sin().mean(dim=1).square()  # [B, slices]
        integral = integral + error * (normal * step * (1 if k == KNOTS else 2))
    return z.size(1) * integral.mean(dim=-1)


def draw_slices(n_features: int, generator: torch.Generator) -> Tensor:
    """Directions for `sigreg`, uniform on the sphere: float32 [F, 64] on the CPU, columns of length 1."""
    drawn = torch.randn(n_features, N_SLICES, generator=generator)
    return drawn / drawn.norm(dim=0)


VARIANTS: dict[str, Callable[..., Tensor]] = {  # of z, tau, clamp; sigreg's also of its slices
    "angular": angular,
    "orthogonalization": orthogonalization,
    "decorrelation": decorrelation,
    "l2_repel": l2_repel,
    "entropy": entropy,
    "cosine": cosine,
    "variance": variance,
    "logdet": logdet,
    "cosreg": cosreg,
    "simctg": simctg,
    "feature_decorrelation": feature_decorrelation,
    "feature_correlation": feature_correlation,
    "istar": istar,
    "istar_reversed": istar_reversed,
    "condition": condition,
    "sigreg": sigreg,
}
WITH_TAU = ("angular", "l2_repel", "entropy", "cosine", "logdet")
CLAMPED = ("angular", "orthogonalization")  # the formulas of angles
SLICED = ("sigreg",)  # the formula of random directions


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


def _covariance(z: Tensor) -> Tensor:
    """Cov [B, F, F], or if it is smaller [B, N, N] with the same eigenvalues except for zeros. z should be float64."""
    _, n_tokens, n_features = z.shape
    centred = (z - z.mean(dim=1, keepdim=True)) / math.sqrt(n_tokens - 1)
    return centred @ centred.mT if n_tokens < n_features else centred.mT @ centred


def _diagonal(pairs: Tensor) -> Tensor:
    return torch.eye(pairs.size(-1), dtype=torch.bool, device=pairs.device)


def _mean_of_pairs(pairs: Tensor) -> Tensor:
    n_tokens = pairs.size(-1)
    return pairs.masked_fill(_diagonal(pairs), 0).sum(dim=(1, 2)) / (n_tokens * (n_tokens - 1))


def _log_mean_exp_of_pairs(logits: Tensor) -> Tensor:
    n_tokens = logits.size(-1)
    total = logits.masked_fill(_diagonal(logits), -math.inf).logsumexp(dim=(1, 2))
    return total - math.log(n_tokens * (n_tokens - 1))
