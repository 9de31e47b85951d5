"""The CPU kernel's three loops over memory in PyTorch operations; `compiled.py` has the same as one compiled pass each.

They define the compiled ones, and take their place where there is no compiler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formulas import NORM_EPS
from .pairwise import arcsin_coefficients, slope_at_edge

STRIP = 128  # rows of pairs at a time; with fewer matmuls are slower, with more they compute more below the diagonal


def directions(z: Tensor, u: Tensor) -> Tensor:
    """Write u = z / (|z| + eps).

    Args:
        z: [n, N, F], contiguous float32.
        u: [n, N, F], contiguous float32 or bfloat16, written.

    Returns:
        |z|, [n, N, 1].
    """
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    u.copy_(z / (norm + NORM_EPS))
    return norm


def pairs(cosines: Tensor, h: Tensor, variant: str, tau: float, clamp: float) -> tuple[Tensor, Tensor]:
    """Write h / h_edge of all pairs, and zero for a token with itself.

    Args:
        cosines: [n, N, N], contiguous float32 or bfloat16. Of each STRIP rows, columns to the left of the square on
            the diagonal are not used.
        h: [n, N, N], contiguous float32 or bfloat16, written; may be the same tensor.
        variant, tau, clamp: see `pairwise.py`.

    Returns:
        S [n], and sum_j h_ij c_ij / h_edge [n, N].
    """
    n, n_tokens, _ = cosines.shape
    total, sums = torch.zeros(n, dtype=torch.float32), torch.zeros(n, n_tokens, dtype=torch.float32)
    for start in range(0, n_tokens, STRIP):
        c = cosines[:, start : start + STRIP, start:].float()
        w, slope = _terms(c, variant, tau, clamp)
        w.diagonal(dim1=1, dim2=2).zero_()
        slope.diagonal(dim1=1, dim2=2).zero_()
        products = slope * c
        total += w.sum(dim=(1, 2)) + w[:, :, STRIP:].sum(dim=(1, 2))
        sums[:, start : start + STRIP] += products.sum(dim=2)
        sums[:, start + STRIP :] += products[:, :, STRIP:].sum(dim=1)
        h[:, start : start + STRIP, start:] = slope
        h[:, start + STRIP :, start : start + STRIP] = slope[:, :, STRIP:].mT
    return total, sums


def _terms(c: Tensor, variant: str, tau: float, clamp: float) -> tuple[Tensor, Tensor]:
    """w and h / h_edge."""
    coefficients = polynomial(variant, tau, clamp)
    if variant == "cosine":
        w = (c * coefficients[0]).exp2_()
        return w, w.clone()
    clamped = c.clamp(*band(variant, clamp))
    squared = clamped * clamped
    *lower, highest = (torch.tensor(a, dtype=torch.float32) for a in coefficients)
    s = (squared * highest).add_(lower.pop())
    for coefficient in reversed(lower):
        torch.addcmul(coefficient, s, squared, out=s)
    base = s.mul_(clamped)
    if variant == "angular":
        base.exp2_()
    edge = slope_at_edge(variant, tau, clamp)
    slope = squared.neg_().add_(1).mul_(edge**2).rsqrt_().mul_(base)  # base / (h_edge sqrt(1 - c~^2))
    return base if variant == "angular" else base.square_(), slope


def band(variant: str, clamp: float) -> tuple[float, float]:
    """Where cosines are clamped. From 0 for orthogonalization, where s+ = max(0, s)."""
    return 0.0 if variant == "orthogonalization" else clamp - 1, 1 - clamp


def polynomial(variant: str, tau: float, clamp: float) -> tuple[float, ...]:
    """a_0.. of s = c~ sum_k a_k c~^(2k), see `arcsin_coefficients`; for cosine, where s = c, a_0 alone.

    Where w = exp(s / tau), it is s / (tau log 2): powers of 2 take a quarter of the time of powers of e.
    """
    unit = 1.0 if variant == "orthogonalization" else 1 / (tau * math.log(2))
    return (unit,) if variant == "cosine" else tuple(a * unit / math.pi for a in arcsin_coefficients(clamp))


def unround(
    product: Tensor, z: Tensor, norm: Tensor, rounded: Tensor, exact: Tensor, scale: Tensor, result: Tensor
) -> None:
    """Write scale_i (product_i - rounded_i u~_i + exact_i u_i), where u~ is u rounded to bfloat16.

    The token's own term in H u is large where tokens are nearly parallel, and so is what rounding takes from it.

    Args:
        product: [n, N, F], contiguous bfloat16: H u.
        z: [n, N, F], contiguous float32.
        norm, rounded, exact, scale: [n, N, 1], contiguous float32: |z|; the diagonal of H, and the same before it was
            rounded; the factor of each row.
        result: [n, N, F], contiguous float32, written.
    """
    u = z / (norm + NORM_EPS)
    torch.mul(product, scale, out=result)
    result.addcmul_(u.to(product.dtype), rounded * scale, value=-1).addcmul_(u, exact * scale)
