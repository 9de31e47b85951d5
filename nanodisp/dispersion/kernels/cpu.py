"""The CPU kernel: two matmuls, and between them one pass over the pairs.

A few sequences at a time (one if it is long) go through four steps:

1. u = z / (|z| + eps), in the matmul dtype;
2. the cosines into a square buffer; in float32 little more than those on and above its diagonal;
3. one pass turns them into h, mirrored, and sums w and h c;
4. H u. The gradient of the normalisation removes the radial component, parallel to u_i. Its size is known in advance,
   sum_j h_ij c_ij, so its negative goes onto the diagonal of H: no further pass over the features, and in bfloat16
   the matmul's result is rounded after the cancellation, not before.

Steps 1, 3 and the end of 4 are loops over memory: one compiled pass each (`compiled.py`), or the same in PyTorch
operations (`loops.py`). The buffers do not grow with the number of sequences, and only dz is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import NORM_EPS
from . import compiled, loops
from .pairwise import gradient_dtype, loss_and_factor, slope_at_edge

SCRATCH_ELEMENTS = 2**20  # in the largest buffer, unless one sequence needs more
SMALL_TAU = 0.5
TINY = torch.finfo(torch.float32).tiny


def pairwise_cosine(
    z: Tensor, variant: str, tau: float, clamp: float, matmul_dtype: torch.dtype, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss of the sequences, and its gradient.

    Args:
        z: [B, N, F], float32, bfloat16 or float16, of any strides.
        variant: one of `pairwise.FAMILY`.
        tau: temperature.
        clamp: margin of the clamped cosines.
        matmul_dtype: float32 or bfloat16.
        with_grad: whether to compute the gradient.

    Returns:
        The loss, a float32 scalar, and dloss/dz, [B, N, F] in `gradient_dtype` (empty without `with_grad`).
    """
    run = loops if compiled.library() is None else compiled
    n_sequences, n_tokens, n_features = z.shape
    at_once = max(1, min(n_sequences, SCRATCH_ELEMENTS // (n_tokens * max(n_tokens, n_features))))
    # rounding c would hurt: orthogonalization's h is proportional to c, and exp(c / tau) is steep for a small tau
    exact_cosines = variant == "orthogonalization" or tau < SMALL_TAU
    cosine_dtype = torch.float32 if exact_cosines else matmul_dtype
    u_scratch = torch.empty(at_once, n_tokens, n_features, dtype=cosine_dtype)
    square_scratch = torch.empty(at_once, n_tokens, n_tokens, dtype=matmul_dtype)
    losses = torch.empty(n_sequences, dtype=torch.float32)
    edge = slope_at_edge(variant, tau, clamp)
    dz = z.new_empty(z.shape if with_grad else 0, dtype=gradient_dtype(z.dtype))

    for first in range(0, n_sequences, at_once):
        group = slice(first, first + at_once)
        some_z = z[group].float().contiguous()
        u, square = u_scratch[: len(some_z)], square_scratch[: len(some_z)]
        norm = run.directions(some_z, u)
        cosines = square if cosine_dtype == matmul_dtype else torch.empty_like(square, dtype=cosine_dtype)
        multiply_upper(u, cosines)
        total, radial = run.pairs(cosines, square, variant, tau, clamp)
        losses[group], factor = loss_and_factor(total, variant, tau, n_tokens)
        if not with_grad:
            continue
        diagonal = square.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        exact = radial.unsqueeze(-1) * (-1 - NORM_EPS / norm.clamp_min(TINY))
        diagonal.copy_(exact)
        scale = (factor * (edge / n_sequences))[:, None, None] / (norm + NORM_EPS)
        gradient = dz[group] if dz.dtype == torch.float32 else torch.empty_like(some_z)
        if matmul_dtype == torch.float32:
            torch.bmm(square.mul_(scale), u, out=gradient)
        else:
            product = torch.bmm(square, u.to(matmul_dtype))
            run.unround(product, some_z, norm, diagonal.float().contiguous(), exact, scale, gradient)
        if gradient.dtype != dz.dtype:
            dz[group] = gradient
    return losses.mean(), dz


def multiply_upper(u: Tensor, cosines: Tensor) -> None:
    """Write u u^T [n, N, N]; in float32 only what `pairs` uses of it. (All costs AMX less than copies of strips.)"""
    n_tokens = u.size(1)
    rows = n_tokens if u.dtype == torch.bfloat16 else loops.STRIP
    for start in range(0, n_tokens, rows):
        torch.bmm(u[:, start : start + rows], u[:, start:].mT, out=cosines[:, start : start + rows, start:])
