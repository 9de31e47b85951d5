"""The Triton kernels of the pairwise-cosine family: loss and gradient in one pass over the pairs.

For a group of sequences at a time:

1. `_norms`: |z_i| of every token. u is never stored: u_i . u_j is z_i . z_j times the two inverse
   norms, and sum_j h_ij u_j is (h_ij / (|z_j| + eps)) times z_j;
2. `_pair_tiles`: one program per tile on or above the diagonal of z z^T. While the tile's
   cosines are in registers it sums w and, if a gradient is needed, writes the tile of H
   (h times the inverse norm of its column) and the mirror tile. Each program writes its sum to its
   own element: no atomics, so the same input gives the same bits;
3. A = H z, a batched matmul of the vendor's library;
4. `_through_normalisation`: dz from A and z, row by row.

H and A are reused by every group; only dz outlives the call.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas import COSINE_MARGIN, NORM_EPS
from .pairwise import arcsin_coefficients, gradient_dtype, loss_and_factor

GROUP_BYTES = 32 * 2**20  # of H and A; less than the L2 cache of the GPUs this is meant for
LARGEST_GRID = 65535  # sequences per launch

EPS = tl.constexpr(NORM_EPS)
BAND = tl.constexpr(1 - COSINE_MARGIN)
A0, A1, A2, A3, A4, A5, A6, A7 = (tl.constexpr(a) for a in arcsin_coefficients(7))
INVERSE_PI = tl.constexpr(1 / math.pi)
OPERAND_TYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
if triton.knobs.runtime.interpret:  # the interpreter stores bfloat16 as integers and multiplies those
    OPERAND_TYPE[torch.bfloat16] = tl.float32


def tile_options(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Tile sizes and launch options of `_pair_tiles`, derived by counting, not tuned at run time.

    A program of tile side T reads 2 / T elements per multiplication from the L2 cache: the larger the
    better, until the tile and its epilogue no longer fit into registers. 128 x 128 in 256 threads
    is 64 accumulators per thread; three stages of two [128, 64] bfloat16 operands are 96 KB of shared memory.
    Compute capability 10 keeps accumulators outside registers and copies them for the epilogue, and a
    float32 matmul (three tf32 products) holds its operands twice: both spill at 128.
    """
    if dtype == torch.float32:
        return {"BLOCK": 64, "BLOCK_F": 32, "num_warps": 4, "num_stages": 3}
    if capability >= 10:
        return {"BLOCK": 64, "BLOCK_F": 64, "num_warps": 4, "num_stages": 4}
    return {"BLOCK": 128, "BLOCK_F": 64, "num_warps": 8, "num_stages": 3}


def pairwise_cosine(
    z: Tensor, variant: str, tau: float, matmul_dtype: torch.dtype, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss of the sequences, and its gradient.

    Args:
        z: [B, N, F], float32, bfloat16 or float16, of any strides, on the GPU.
        variant: one of `pairwise.FAMILY`.
        tau: temperature.
        matmul_dtype: float32 or bfloat16.
        with_grad: whether to compute the gradient.

    Returns:
        The loss, a float32 scalar, and dloss/dz, [B, N, F] in `gradient_dtype` (empty without `with_grad`).
    """
    n_sequences, n_tokens, n_features = z.shape
    capability = torch.cuda.get_device_properties(z.device).major if z.is_cuda else 0
    options = tile_options(matmul_dtype, capability)
    n_blocks = triton.cdiv(n_tokens, options["BLOCK"])
    n_tiles = n_blocks * (n_blocks + 1) // 2
    exponent = 1 / (tau * math.log(2)) * (1 / math.pi if variant == "angular" else 1)

    h_stride = triton.cdiv(n_tokens, 16) * 16  # Triton vectorises stores if the row stride is a multiple of 16
    bytes_per_sequence = n_tokens * (h_stride * matmul_dtype.itemsize + n_features * 4)
    n_groups = triton.cdiv(n_sequences, min(LARGEST_GRID, max(1, GROUP_BYTES // bytes_per_sequence)))
    at_once = max(1, triton.cdiv(n_sequences, max(1, n_groups)))  # groups of equal size
    h_scratch = z.new_empty((at_once, n_tokens, h_stride) if with_grad else 0, dtype=matmul_dtype)
    sums_scratch = z.new_empty(at_once, n_tiles, dtype=torch.float32)
    norm_scratch = z.new_empty(at_once, n_tokens, dtype=torch.float32)
    losses = z.new_empty(n_sequences, dtype=torch.float32)
    dz = z.new_empty(z.shape if with_grad else 0, dtype=gradient_dtype(z.dtype))

    for first in range(0, n_sequences, at_once):
        group = slice(first, first + at_once)
        some_z = z[group]
        n = some_z.size(0)
        h_matrix, sums, norm = h_scratch[:n], sums_scratch[:n], norm_scratch[:n]
        _norms[n_tokens, n](some_z, norm, *some_z.stride(), n_tokens, n_features, **_row_options(n_features))
        x = _matmul_operand(some_z, matmul_dtype, options["BLOCK_F"])
        _pair_tiles[n_tiles, n](
            x,
            norm,
            h_matrix,
            sums,
            *x.stride()[:2],
            h_stride,
            n_tokens,
            n_features,
            exponent,
            VARIANT=variant,
            WITH_GRAD=with_grad,
            OPERAND=OPERAND_TYPE[matmul_dtype],
            PRECISION="tf32x3" if matmul_dtype == torch.float32 else "ieee",
            **options,
        )
        losses[group], factor = loss_and_factor(sums.sum(dim=1), variant, tau, n_tokens)
        if with_grad:
            _gradient(some_z, x, norm, h_matrix[..., :n_tokens], factor / n_sequences, dz[group])
    return losses.mean(), dz


def _gradient(z: Tensor, x: Tensor, norm: Tensor, h_matrix: Tensor, factor: Tensor, dz: Tensor) -> None:
    """Compute A = H x, and dz from it.

    A is float32 even if H is not: rounding it would hurt most for nearly parallel tokens, where the
    tangential component that remains is small compared with the radial one that is removed.
    """
    n, n_tokens, n_features = z.shape
    if x.dtype == torch.float32:
        a = torch.bmm(h_matrix, x)
    elif x.is_cuda:
        a = torch.bmm(h_matrix, x, out_dtype=torch.float32)
    else:  # in the interpreter
        a = torch.bmm(h_matrix.float(), x.float())
    _through_normalisation[n_tokens, n](
        z, a, norm, factor, dz, *z.stride(), n_tokens, n_features, **_row_options(n_features)
    )


def _row_options(n_features: int) -> dict[str, int]:
    """Launch options of the kernels with one program per row: 16 elements per thread."""
    block = min(4096, triton.next_power_of_2(n_features))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def _matmul_operand(z: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    """z [n, N, F] in the matmul dtype, laid out for vectorised loads without masks: contiguous features, row
    strides that are multiples of 16, and zero padding of the features to a multiple of the block."""
    n, n_tokens, n_features = z.shape
    fits = z.stride(2) == 1 and z.stride(0) % 16 == z.stride(1) % 16 == z.data_ptr() % 16 == n_features % block == 0
    if fits and z.dtype == dtype:
        return z
    padded = z.new_zeros(n, n_tokens, triton.cdiv(n_features, block) * block, dtype=dtype)
    return padded[..., :n_features].copy_(z)


@triton.jit
def _norms(z, norm, stride_b, stride_n, stride_f, n_tokens, n_features, BLOCK: tl.constexpr):
    """norm[b, i] = |z[b, i]|, one program per row."""
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = z + b * stride_b + i.to(tl.int64) * stride_n
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_features, BLOCK):
        f = start + tl.arange(0, BLOCK)
        value = tl.load(row + f * stride_f, mask=f < n_features, other=0.0).to(tl.float32)
        squares += value * value
    tl.store(norm + b * n_tokens + i, tl.sqrt(tl.sum(squares)))


@triton.jit
def _pair_tiles(
    z,
    norm,
    h_matrix,
    sums,
    stride_b,
    stride_n,
    h_stride,
    n_tokens,
    n_features,
    exponent,  # exp(s / tau) = exp2(arcsin(c) * exponent), or exp2(c * exponent) for cosine
    VARIANT: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One tile of pairs on or above the diagonal: its sum of w, its tile of H and the mirror tile.

    h_matrix[b, i, j] = h(c_ij) / (|z_j| + eps), zero on the diagonal. sums[b, tile] = sum of w; a tile
    above the diagonal counts twice.
    """
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    # Tiles are numbered down the columns of the upper triangle: column t begins at t (t + 1) / 2.
    column = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > tile, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= tile, column + 1, column)
    row = tile - column * (column + 1) // 2

    i = row * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    f = tl.arange(0, BLOCK_F)
    # Rows past the end read the last token again; their results are masked below.
    i_pointers = z + b * stride_b + tl.minimum(i, n_tokens - 1)[:, None] * stride_n + f[None, :]
    j_pointers = z + b * stride_b + tl.minimum(j, n_tokens - 1)[None, :] * stride_n + f[:, None]
    c = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, n_features, BLOCK_F):
        z_i = tl.load(i_pointers).to(OPERAND)
        z_j = tl.load(j_pointers).to(OPERAND)
        c = tl.dot(z_i, z_j, c, input_precision=PRECISION)
        i_pointers += BLOCK_F
        j_pointers += BLOCK_F

    i_inverse = 1.0 / (tl.load(norm + b * n_tokens + i, mask=i < n_tokens, other=float("inf")) + EPS)
    j_inverse = 1.0 / (tl.load(norm + b * n_tokens + j, mask=j < n_tokens, other=float("inf")) + EPS)
    c = c * i_inverse[:, None] * j_inverse[None, :]
    pair = (i[:, None] < n_tokens) & (j[None, :] < n_tokens) & (i[:, None] != j[None, :])
    if VARIANT == "cosine":
        w = tl.where(pair, tl.exp2(c * exponent), 0.0)
        h = w
    else:
        lowest: tl.constexpr = 0.0 if VARIANT == "orthogonalization" else -BAND
        c = tl.clamp(c, lowest, BAND, propagate_nan=tl.PropagateNan.ALL)
        t = c * c
        arcsin = ((((((A7 * t + A6) * t + A5) * t + A4) * t + A3) * t + A2) * t + A1) * t + A0
        arcsin = arcsin * c
        if VARIANT == "angular":
            w = tl.where(pair, tl.exp2(arcsin * exponent), 0.0)
            h = w * tl.rsqrt(1.0 - t)
        else:
            s = tl.where(pair, arcsin * INVERSE_PI, 0.0)
            w = s * s
            h = s * tl.rsqrt(1.0 - t)
    total = tl.sum(w)
    tl.store(sums + b * tl.num_programs(0) + tile, tl.where(row == column, total, 2.0 * total))

    if WITH_GRAD:
        h_matrix += b * n_tokens * h_stride
        inside = (i[:, None] < n_tokens) & (j[None, :] < n_tokens)
        upper = (h * j_inverse[None, :]).to(h_matrix.dtype.element_ty)
        tl.store(h_matrix + i[:, None] * h_stride + j[None, :], upper, mask=inside)
        if row != column:
            mirror = tl.trans((h * i_inverse[:, None]).to(h_matrix.dtype.element_ty))
            inside = (j[:, None] < n_tokens) & (i[None, :] < n_tokens)
            tl.store(h_matrix + j[:, None] * h_stride + i[None, :], mirror, mask=inside)


@triton.jit
def _through_normalisation(
    z, a, norm, factor, dz, stride_b, stride_n, stride_f, n_tokens, n_features, BLOCK: tl.constexpr
):
    """dz = factor (a - z (z . a) / (|z| (|z| + eps))) / (|z| + eps), one program per row; a and dz contiguous.

    The gradient of u = z / (|z| + eps): a change in the length of z has almost no effect on u.
    """
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = z + b * stride_b + i.to(tl.int64) * stride_n
    token = b * n_tokens + i
    length = tl.load(norm + token)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_features, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inside = f < n_features
        value = tl.load(row + f * stride_f, mask=inside, other=0.0).to(tl.float32)
        products += value * tl.load(a + token * n_features + f, mask=inside, other=0.0)
    inverse = 1.0 / (length + EPS)
    radial = tl.sum(products) * inverse / tl.where(length > 0.0, length, 1.0)
    scale = tl.load(factor + b) * inverse
    for start in range(0, n_features, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inside = f < n_features
        value = tl.load(row + f * stride_f, mask=inside, other=0.0).to(tl.float32)
        tangential = tl.load(a + token * n_features + f, mask=inside, other=0.0) - value * radial
        tl.store(dz + token * n_features + f, (tangential * scale).to(dz.dtype.element_ty), mask=inside)
