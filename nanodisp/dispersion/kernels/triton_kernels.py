"""The four Triton kernels of the pairwise-cosine family; `gpu.py` launches them.

z is [B, N, F], u_i = z_i / (|z_i| + eps), c_ij = u_i . u_j; `pairwise.py` defines w, h, S and the factor k.

1. `prepare`: u in the matmul dtype, padded with zeros to whole tiles;
2. `pairs`: one program per tile on or above the diagonal of C = U U^T. While a tile's cosines are in registers, it
   sums w(c_ij), writes h(c_ij) and its mirror image, and sums h_ij c_ij along rows and columns;
3. `gradient`: the matmul H U, whose accumulator begins and ends so that it becomes dz;
4. `mean_loss`: the sums of w to one scalar.

*The gradient.* Write k for the factor of a sequence, known once S is (`pairwise.py`), and n = |z_i|. Then

    dloss/du_i = k a_i,   a_i = sum_{j!=i} h_ij u_j.

A change of z_i moves u_i = z_i / (n + eps) by du_i = (dz_i - u_i (u_i . dz_i) (n + eps) / n) / (n + eps), since
dn = z_i . dz_i / n and z_i = (n + eps) u_i. The map is symmetric, so

    dloss/dz_i = k / (n + eps) * (a_i - r_i (1 + eps / n) u_i),   r_i = u_i . a_i = sum_{j!=i} h_ij c_ij.

r_i needs only what `pairs` has in registers anyway, so a_i never goes to memory.

*Rounding.* In bfloat16 the matmuls take rounded directions u' and rounded h. For nearly parallel tokens a_i and r_i u_i
nearly cancel, and what is left is small beside either: errors must not be radial. Therefore

- H is divided by the slope at the edge of the clamped band, where such tokens are: their h is 1, which rounding keeps;
- r'_i sums the rounded h times u'_i . u'_j, exactly what the matmul multiplies. It is the product of the matmul's row
  with u'_i, where the product with u_i is wanted; as the row is nearly parallel to u'_i, that is r'_i times
  (u_i . u'_i) / |u'_i|^2, the `alignment` that `prepare` computes;
- u_i itself is computed again from z, in float32, and the accumulator begins at -r_i (1 + eps / n) u_i, in float32.

Every program writes its sums to elements of its own, without atomics: the same input gives the same bits. Blocks are
found with 64-bit arithmetic, the elements of a block with 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..formulas import NORM_EPS

EPS = tl.constexpr(NORM_EPS)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
INVERSE_PI = tl.constexpr(1 / math.pi)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _configuration(num_warps: int, num_stages: int, **blocks: int) -> triton.Config:
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


# What autotuning tries on the first call at each size; its choice is kept on disk. One that needs more shared memory
# than the GPU has drops out; the first fits every GPU and dtype. The interpreter takes the last.
PAIRS = [
    _configuration(num_warps=8, num_stages=4, BLOCK_F=32),
    _configuration(num_warps=8, num_stages=3, BLOCK_F=64),
    _configuration(num_warps=8, num_stages=4, BLOCK_F=64),
]
GRADIENT = [
    _configuration(num_warps=4, num_stages=3, BLOCK_I=64, BLOCK_J=32, BLOCK_F=64),
    _configuration(num_warps=8, num_stages=3, BLOCK_I=128, BLOCK_J=64, BLOCK_F=128),
    _configuration(num_warps=4, num_stages=3, BLOCK_I=64, BLOCK_J=64, BLOCK_F=128),
]


def _tuned(configurations: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    def that_divide(some: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        return [each for each in some if constants["N_PADDED"] % each.kwargs.get("BLOCK_I", 1) == 0]

    some = configurations[-1:] if INTERPRETED.value else configurations
    return triton.autotune(some, key, prune_configs_by={"early_config_prune": that_divide}, cache_results=True)


@triton.jit
def prepare(
    z,
    u,
    inverse,
    alignment,
    stride_b,
    stride_n,
    stride_f,
    n_rows,
    n_tokens,
    N_FEATURES: tl.constexpr,
    N_PADDED: tl.constexpr,
    F_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u_i = z_i / (|z_i| + eps), zero in the padding, and two numbers of each token; ROWS tokens in each program.

    z: [B, N, N_FEATURES], any floating dtype and strides. u: [B, N_PADDED, F_PADDED], the matmul dtype.
    inverse: [B, N_PADDED], float32: 1 / (|z_i| + eps).
    alignment: [B, N_PADDED], float32: (1 + eps / |z_i|) (u_i . u'_i) / |u'_i|^2, u' the u that is stored.
    n_rows: B N_PADDED. BLOCK: a power of two, at least F_PADDED.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = row // N_PADDED
    i = row % N_PADDED
    f = tl.arange(0, BLOCK)
    inside = ((row < n_rows) & (i < n_tokens))[:, None] & (f < N_FEATURES)[None, :]
    place = (b * stride_b + i * stride_n)[:, None] + (f.to(tl.int64) * stride_f)[None, :]
    value = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, axis=1))
    scale = 1.0 / (length + EPS)
    rounded = (value * scale[:, None]).to(u.dtype.element_ty)
    inside = (row < n_rows)[:, None] & (f < F_PADDED)[None, :]
    tl.store(u + row[:, None] * F_PADDED + f[None, :], rounded, mask=inside)
    tl.store(inverse + row, scale, mask=row < n_rows)
    rounded = rounded.to(tl.float32)
    squared = tl.maximum(tl.sum(rounded * rounded, axis=1), TINY)
    cosine = tl.sum(value * scale[:, None] * rounded, axis=1) / squared
    tl.store(alignment + row, (1.0 / tl.maximum(length, TINY) * EPS + 1.0) * cosine, mask=row < n_rows)


@triton.jit
def _dot(a, b, accumulator):
    """accumulator + a b, of float32 or bfloat16 tiles; in float32 as three products of tf32 parts."""
    if a.dtype == tl.float32:
        accumulator = tl.dot(a, b, accumulator, input_precision="tf32x3")
    elif INTERPRETED:  # it keeps bfloat16 as integers, and would multiply those
        accumulator = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        accumulator = tl.dot(a, b, accumulator)
    return accumulator


@triton.jit
def _arcsin(c, COEFFICIENTS: tl.constexpr):
    """arcsin(c) on the clamped band, as a polynomial: `pairwise.arcsin_coefficients`."""
    t = c * c
    HIGHEST: tl.constexpr = len(COEFFICIENTS) - 1
    series = t * COEFFICIENTS[HIGHEST] + COEFFICIENTS[HIGHEST - 1]
    for k in tl.static_range(HIGHEST - 2, -1, -1):
        series = series * t + COEFFICIENTS[k]
    return series * c


@triton.jit
def _weights(c, exponent, VARIANT: tl.constexpr, BAND: tl.constexpr, COEFFICIENTS: tl.constexpr):
    """w and h of cosines c, see `pairwise.py`; exp(s / tau) = exp2(arcsin(c) exponent), of cosine exp2(c exponent)."""
    if VARIANT == "cosine":
        w = tl.exp2(c * exponent)
        h = w
    else:
        lowest: tl.constexpr = 0.0 if VARIANT == "orthogonalization" else -BAND
        c = tl.clamp(c, lowest, BAND, propagate_nan=tl.PropagateNan.ALL)
        arcsin = _arcsin(c, COEFFICIENTS)
        if VARIANT == "angular":
            w = tl.exp2(arcsin * exponent)
            h = w * tl.rsqrt(1.0 - c * c)
        else:
            s = arcsin * INVERSE_PI
            w = s * s
            h = s * tl.rsqrt(1.0 - c * c)
    return w, h


@_tuned(PAIRS, key=["N_PADDED", "F_PADDED"])
@triton.jit
def pairs(
    u,
    h,
    sums,
    radial,
    n_tokens,
    exponent,
    inverse_edge,
    VARIANT: tl.constexpr,
    BAND: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    SIDE: tl.constexpr,
    N_PADDED: tl.constexpr,
    F_PADDED: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One tile of pairs on or above the diagonal: its sum of w, its tile of H and the mirror tile, its row sums of r.

    u: [B, N_PADDED, F_PADDED], the matmul dtype. n_tokens: N, of which N_PADDED is a multiple of SIDE.
    h: [B, N_PADDED, N_PADDED], the matmul dtype: h(c_ij) inverse_edge, zero on the diagonal and in the padding.
    BAND: 1 - clamp. COEFFICIENTS: of arcsin within it.
    sums: [B, tiles], float32: the sum of w; a tile above the diagonal counts twice.
    radial: [B, blocks, N_PADDED], float32: element k of token i is the sum of h_ij c_ij over the tokens j of block k.
    """
    N_BLOCKS: tl.constexpr = N_PADDED // SIDE
    N_TILES: tl.constexpr = N_BLOCKS * (N_BLOCKS + 1) // 2
    b = (tl.program_id(0) // N_TILES).to(tl.int64)
    tile = tl.program_id(0) % N_TILES
    # Tiles are numbered down the columns of the upper triangle: column t begins at t (t + 1) / 2.
    column = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > tile, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= tile, column + 1, column)
    row = tile - column * (column + 1) // 2

    i = tl.arange(0, SIDE)
    f = tl.arange(0, BLOCK_F)
    first_i = (b * N_PADDED + row * SIDE) * F_PADDED  # 64 bits find a tile, 32 an element in it
    first_j = (b * N_PADDED + column * SIDE) * F_PADDED
    u_i = u + first_i + i[:, None] * F_PADDED + f[None, :]
    u_j = u + first_j + i[None, :] * F_PADDED + f[:, None]
    c = tl.zeros((SIDE, SIDE), tl.float32)
    for _ in range(0, F_PADDED, BLOCK_F):
        c = _dot(tl.load(u_i), tl.load(u_j), c)
        u_i += BLOCK_F
        u_j += BLOCK_F

    w, slope = _weights(c, exponent, VARIANT, BAND, COEFFICIENTS)
    pair = (row * SIDE + i < n_tokens)[:, None] & (column * SIDE + i < n_tokens)[None, :]
    pair &= (i[:, None] != i[None, :]) | (row != column)
    total = tl.sum(tl.where(pair, w, 0.0))
    tl.store(sums + b * N_TILES + tile, tl.where(row == column, total, 2.0 * total))

    if WITH_GRAD:
        rounded = tl.where(pair, slope * inverse_edge, 0.0).to(h.dtype.element_ty)
        product = tl.where(pair, rounded.to(tl.float32) * c, 0.0)
        h += b * N_PADDED * N_PADDED + i[:, None] * N_PADDED + i[None, :]
        radial += b * N_BLOCKS * N_PADDED + i
        tl.store(h + row.to(tl.int64) * SIDE * N_PADDED + column * SIDE, rounded)
        tl.store(radial + column * N_PADDED + row * SIDE, tl.sum(product, axis=1))
        if row != column:
            tl.store(h + column.to(tl.int64) * SIDE * N_PADDED + row * SIDE, tl.trans(rounded))
            tl.store(radial + row * N_PADDED + column * SIDE, tl.sum(product, axis=0))


@_tuned(GRADIENT, key=["N_PADDED", "N_FEATURES"])
@triton.jit
def gradient(
    z,
    u,
    inverse,
    alignment,
    h,
    sums,
    radial,
    dz,
    stride_b,
    stride_n,
    stride_f,
    n_tokens,
    factor,
    LOG: tl.constexpr,
    N_FEATURES: tl.constexpr,
    N_PADDED: tl.constexpr,
    F_PADDED: tl.constexpr,
    SIDE: tl.constexpr,
    N_TILES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dz_i = k / (|z_i| + eps) (sum_j h_ij u_j - r_i (1 + eps / |z_i|) u_i), for BLOCK_I tokens and BLOCK_F features.

    z: [B, N, N_FEATURES], any floating dtype and strides. u, h, sums, radial: what `pairs` read and wrote. inverse,
    alignment: what `prepare` wrote. dz: [B, N, N_FEATURES], contiguous. k = factor / S if LOG, else factor.
    TILES: a power of two, at least N_TILES.
    """
    N_BLOCKS: tl.constexpr = N_PADDED // SIDE
    F_BLOCKS: tl.constexpr = (N_FEATURES + BLOCK_F - 1) // BLOCK_F
    I_BLOCKS: tl.constexpr = N_PADDED // BLOCK_I
    program = tl.program_id(0)  # those that read the same rows of H follow each other
    b = (program // (F_BLOCKS * I_BLOCKS)).to(tl.int64)
    first = program // F_BLOCKS % I_BLOCKS * BLOCK_I
    f = program % F_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)

    r = tl.zeros((BLOCK_I,), tl.float32)
    for block in range(0, N_BLOCKS):
        r += tl.load(radial + (b * N_BLOCKS + block) * N_PADDED + first + i)
    scale = tl.load(inverse + b * N_PADDED + first + i)
    r *= tl.load(alignment + b * N_PADDED + first + i) * scale
    inside = (first + i < n_tokens)[:, None] & (f < N_FEATURES)[None, :]
    z += b * stride_b + first.to(tl.int64) * stride_n  # 64 bits find a block, 32 an element in it
    value = tl.load(z + i[:, None] * stride_n + f[None, :] * stride_f, mask=inside, other=0.0).to(tl.float32)
    a = -r[:, None] * value  # first, so that registers need not hold it beside the accumulator

    h_ij = h + (b * N_PADDED + first) * N_PADDED + i[:, None] * N_PADDED + j[None, :]
    u_j = u + b * N_PADDED * F_PADDED + j[:, None] * F_PADDED + (f % F_PADDED)[None, :]  # past the end: not stored
    for _ in range(0, N_PADDED, BLOCK_J):
        a = _dot(tl.load(h_ij), tl.load(u_j), a)
        h_ij += BLOCK_J
        u_j += BLOCK_J * F_PADDED

    k = factor
    if LOG:
        tile = tl.arange(0, TILES)
        k = factor / tl.sum(tl.load(sums + b * N_TILES + tile, mask=tile < N_TILES, other=0.0))
    a *= (k * scale)[:, None]
    dz += (b * n_tokens + first) * N_FEATURES
    tl.store(dz + i[:, None] * N_FEATURES + f[None, :], a.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def mean_loss(
    sums,
    loss,
    n_sequences,
    inverse_pairs,
    offset,
    LOG: tl.constexpr,
    N_TILES: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean over the sequences of log(S / P) - offset, or of S / P without LOG; one program.

    sums: [B, N_TILES], float32. loss: a float32 scalar. inverse_pairs: 1 / P, P = N (N - 1).
    TILES: a power of two, at least N_TILES. ROWS: sequences at a time, a power of two.
    """
    tile = tl.arange(0, TILES)
    b = tl.arange(0, ROWS)
    added = tl.zeros((ROWS,), tl.float32)
    first = 0
    while first < n_sequences:
        inside = first + b < n_sequences
        element = (first + b)[:, None] * N_TILES + tile[None, :]
        partial = tl.load(sums + element, mask=inside[:, None] & (tile < N_TILES)[None, :], other=0.0)
        mean = tl.where(inside, tl.sum(partial, axis=1) * inverse_pairs, 1.0)
        if LOG:
            mean = tl.log(mean) - offset
        added += tl.where(inside, mean, 0.0)
        first += ROWS
    tl.store(loss, tl.sum(added) / n_sequences)
