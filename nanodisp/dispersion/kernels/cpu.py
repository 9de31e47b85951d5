"""The CPU kernel: the single-pass scheme in blocked PyTorch operations on small, reused buffers.

A few sequences at a time (one if it is long) go through four steps:

1. u = z / (|z| + eps), padded with zero rows to a multiple of the block, and its copy in the matmul dtype;
2. the cosines on and above the diagonal, then their w and h. The square of pairs is halved
   recursively: the off-diagonal quarter of every half is one matmul, and blocks on the diagonal
   remain. Everything is packed in one flat tensor, so that an elementwise step is one call over
   data that stays in the processor's cache;
3. h and its mirror image are unpacked into the square H, and H u is one batched matmul;
4. the gradient of the normalisation removes the radial component, parallel to u_i. Its size is
   known in advance, sum_j h_ij c_ij, so its negative goes onto the diagonal of H: no further pass
   over the features, and in bfloat16 the matmul's result is rounded after the cancellation, not before.

The buffers do not grow with the number of sequences, and only dz is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formulas import COSINE_MARGIN, NORM_EPS
from .pairwise import arcsin_coefficients, gradient_dtype, loss_and_factor, slope_at_edge

SCRATCH_ELEMENTS = 2**20  # in the largest buffer, unless one sequence needs more
SMALLEST_BLOCK = 128  # smaller ones slow the matmul down by more than they save
ARCSIN = {torch.float32: arcsin_coefficients(7), torch.bfloat16: arcsin_coefficients(3)}  # as accurate as the cosines
SMALL_TAU = 0.5
TINY = torch.finfo(torch.float32).tiny


def pairwise_cosine(
    z: Tensor, variant: str, tau: float, matmul_dtype: torch.dtype, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss of the sequences, and its gradient.

    Args:
        z: [B, N, F], float32, bfloat16 or float16, of any strides.
        variant: one of `pairwise.FAMILY`.
        tau: temperature.
        matmul_dtype: float32 or bfloat16.
        with_grad: whether to compute the gradient.

    Returns:
        The loss, a float32 scalar, and dloss/dz, [B, N, F] in `gradient_dtype` (empty without `with_grad`).
    """
    n_sequences, n_tokens, n_features = z.shape
    n_halvings = max(0, (n_tokens // SMALLEST_BLOCK).bit_length() - 1)
    padded = -(-n_tokens >> n_halvings) << n_halvings
    n_pairs = padded * (padded + (padded >> n_halvings)) // 2  # packed, of one sequence
    at_once = max(1, min(n_sequences, SCRATCH_ELEMENTS // (padded * max(padded, n_features))))

    # rounding c would hurt: orthogonalization's h is proportional to c, and exp(c / tau) is steep for a small tau
    cosine_dtype = torch.float32 if variant == "orthogonalization" or tau < SMALL_TAU else matmul_dtype
    direction_scratch = torch.zeros(at_once, padded, n_features, dtype=torch.float32)
    result_scratch = torch.empty(at_once, padded, n_features, dtype=matmul_dtype)
    square_scratch = torch.empty(at_once, padded, padded, dtype=matmul_dtype)
    packed_scratch = torch.empty(at_once * n_pairs, dtype=cosine_dtype)
    float_scratch = torch.empty(3, at_once * n_pairs, dtype=torch.float32)
    losses = torch.empty(n_sequences, dtype=torch.float32)
    h_edge = torch.tensor(slope_at_edge(variant, tau), dtype=torch.float32)
    dz = z.new_empty(z.shape if with_grad else 0, dtype=gradient_dtype(z.dtype))

    for first in range(0, n_sequences, at_once):
        group = slice(first, first + at_once)
        some_z = z[group].float()
        n = some_z.size(0)
        packed, (clamped, squared, terms) = packed_scratch[: n * n_pairs], float_scratch[:, : n * n_pairs]

        norm = torch.linalg.vector_norm(some_z, dim=-1, keepdim=True)
        inverse = (norm + NORM_EPS).reciprocal_()
        directions = direction_scratch[:n]
        torch.mul(some_z, inverse, out=directions[:, :n_tokens])
        u = directions.to(matmul_dtype)
        _multiply_upper(directions if cosine_dtype == torch.float32 else u, _levels(packed, n, n_halvings))
        cosines = packed.float()

        _base_terms(cosines, clamped, squared, terms, variant, tau, ARCSIN[cosine_dtype])
        levels = _levels(terms, n, n_halvings)
        _clear_padding(levels, padded - n_tokens)
        if variant == "orthogonalization":
            total = _sum(_levels(torch.mul(terms, terms, out=clamped), n, n_halvings))
        else:
            total = _sum(levels)
        losses[group], factor = loss_and_factor(total, variant, tau, n_tokens)
        if not with_grad:
            continue

        if variant != "cosine":  # h / h_edge = w / (h_edge sqrt(1 - c~^2))
            terms.mul_(torch.sub(h_edge**2, squared, alpha=float(h_edge) ** 2, out=squared).rsqrt_())
        radial = _row_sums(_levels(torch.mul(cosines, terms, out=clamped), n, n_halvings))[:, :n_tokens, None]
        radial *= 1 + NORM_EPS / norm.clamp_min(TINY)
        square, result = square_scratch[:n], result_scratch[:n]
        _unpack(_levels(terms.to(matmul_dtype), n, n_halvings), square)
        diagonal = square.diagonal(dim1=1, dim2=2)[:, :n_tokens, None]
        diagonal.copy_(-radial)
        scale = inverse * (factor * h_edge / n_sequences)[:, None, None]
        gradient = dz[group] if dz.dtype == torch.float32 else torch.empty_like(some_z)
        torch.bmm(square, u, out=result)
        torch.mul(result[:, :n_tokens], scale, out=gradient)
        if matmul_dtype == torch.bfloat16:  # corrects the rounding of u_i and of its large factor
            gradient.addcmul_(u[:, :n_tokens], diagonal * scale, value=-1)
            gradient.addcmul_(directions[:, :n_tokens], radial * scale, value=-1)
        if gradient.dtype != dz.dtype:
            dz[group] = gradient
    return losses.mean(), dz


def _levels(packed: Tensor, n: int, n_halvings: int) -> list[Tensor]:
    """Views of the packed pairs of n sequences, one per level of halving, [n, blocks, size, size].

    The last one holds the blocks on the diagonal, the others the blocks above it.
    """
    n_blocks = 1 << n_halvings
    side = math.isqrt(2 * packed.numel() // (n * n_blocks * (n_blocks + 1)))  # of a block on the diagonal
    shapes = [(n, 1 << k, side * n_blocks >> (k + 1), side * n_blocks >> (k + 1)) for k in range(n_halvings)]
    shapes.append((n, n_blocks, side, side))
    parts = packed.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _multiply_upper(u: Tensor, levels: list[Tensor]) -> None:
    """u [n, padded, F] -> u u^T into the levels."""
    *above, diagonal = (level.flatten(0, 1) for level in levels)
    for level in above:
        halves = u.view(level.size(0), 2, -1, u.size(-1))
        if u.dtype == torch.float32:
            torch.bmm(halves[:, 0], halves[:, 1].mT, out=level)
        else:  # a batched bfloat16 matmul would first copy strided operands
            for (first, second), block in zip(halves, level, strict=True):
                torch.mm(first, second.T, out=block)
    blocks = u.view(diagonal.size(0), -1, u.size(-1))
    torch.bmm(blocks, blocks.mT, out=diagonal)


def _base_terms(
    cosines: Tensor,
    clamped: Tensor,
    squared: Tensor,
    terms: Tensor,
    variant: str,
    tau: float,
    arcsin: tuple[float, ...],
) -> None:
    """exp(s / tau), or max(0, s) for orthogonalization, into `terms`; c~^2 into `squared`."""
    exponent = 1 / (tau * math.log(2))  # exp2 costs a quarter of exp
    if variant == "cosine":
        torch.mul(cosines, exponent, out=terms).exp2_()
        return
    torch.clamp(cosines, 0 if variant == "orthogonalization" else COSINE_MARGIN - 1, 1 - COSINE_MARGIN, out=clamped)
    torch.mul(clamped, clamped, out=squared)
    unit = (1 if variant == "orthogonalization" else exponent) / math.pi
    *lower, highest = (torch.tensor(a * unit, dtype=torch.float32) for a in arcsin)
    torch.mul(squared, highest, out=terms).add_(lower.pop())
    for coefficient in reversed(lower):
        torch.addcmul(coefficient, terms, squared, out=terms)
    terms.mul_(clamped)
    if variant == "angular":
        terms.exp2_()


def _clear_padding(levels: list[Tensor], n_padding: int) -> None:
    """Zero the pairs of a token with itself and with the padding rows of the last block."""
    levels[-1].diagonal(dim1=-2, dim2=-1).zero_()
    if n_padding:
        for level in levels:
            level[:, -1, :, -n_padding:] = 0
        levels[-1][:, -1, -n_padding:] = 0


def _sum(levels: list[Tensor]) -> Tensor:
    """Sum over all pairs of each sequence [n]: blocks above the diagonal count twice."""
    *above, diagonal = (level.sum(dim=(1, 2, 3)) for level in levels)
    return diagonal + 2 * sum(above)


def _row_sums(levels: list[Tensor]) -> Tensor:
    """Sum of each row of the symmetric square, [n, padded]."""
    *above, diagonal = levels
    sums = diagonal.sum(dim=-1).flatten(1)
    for level in above:
        n, blocks, size, _ = level.shape
        halves = sums.view(n, blocks, 2, size)
        halves[:, :, 0] += level.sum(dim=-1)
        halves[:, :, 1] += level.sum(dim=-2)
    return sums


def _unpack(levels: list[Tensor], square: Tensor) -> None:
    """Write the levels and their mirror images into the square [n, padded, padded]."""
    *above, diagonal = levels
    n = square.size(0)
    for level in above:
        blocks, size = level.shape[1:3]
        halves = square.view(n, blocks, 2, size, blocks, 2, size).diagonal(dim1=1, dim2=4).movedim(-1, 1)
        halves[:, :, 0, :, 1] = level  # halves [n, blocks, 2, size, 2, size]
        halves[:, :, 1, :, 0] = level.mT
    blocks, size = diagonal.shape[1:3]
    square.view(n, blocks, size, blocks, size).diagonal(dim1=1, dim2=3).movedim(-1, 1).copy_(diagonal)
