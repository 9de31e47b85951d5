"""The Triton path of the pairwise-cosine family: loss and gradient of all sequences in four launches.

z is [B, N, F], and B may count the sequences of many layers: nothing is done layer by layer. `triton_kernels.py` has
the kernels and their mathematics. What lives during a call, beside z and dz: u in the matmul dtype, as many elements
as z, and H, N^2 a sequence; only dz outlives it. No value is read back from the GPU and no size depends on one, so a
CUDA graph can capture a call (after a first one, which compiles and tunes).
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .pairwise import arcsin_coefficients, constants_of_loss, gradient_dtype, slope_at_edge

H_BYTES = 256 * 2**20  # of H at a time; more sequences than that take further launches of `pairs` and `gradient`
FEATURE_TILE = 64  # u is padded to a multiple of it, which every BLOCK_F of `pairs` divides


def tile_side(n_tokens: int, dtype: torch.dtype, capability: int) -> int:
    """The side of a tile of pairs, derived by counting.

    A program of side T reads 2 / T elements per multiplication from the L2 cache: the larger the better, until
    the tile and its epilogue no longer fit into registers. 128 x 128 in 256 threads is 64 accumulators per thread.
    Compute capability 10 keeps accumulators outside registers and copies them for the epilogue, and a
    float32 matmul (three tf32 products) holds its operands twice: both spill at 128.
    """
    small = n_tokens <= 64 or dtype == torch.float32 or capability == 10 or kernels.INTERPRETED.value
    return 64 if small else 128


def sequences_at_once(n_sequences: int, n_tokens: int, dtype: torch.dtype, side: int) -> int:
    """How many sequences share a launch, in groups of equal size: nearly always all of them."""
    bytes_each = (triton.cdiv(n_tokens, side) * side) ** 2 * dtype.itemsize
    n_groups = triton.cdiv(n_sequences, max(1, H_BYTES // bytes_each))
    return max(1, triton.cdiv(n_sequences, max(1, n_groups)))


def pairwise_cosine(
    z: Tensor, variant: str, tau: float, clamp: float, matmul_dtype: torch.dtype, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss of the sequences, and its gradient.

    Args:
        z: [B, N, F], float32, bfloat16 or float16, of any strides, on the GPU.
        variant: one of `pairwise.FAMILY`.
        tau: temperature.
        clamp: margin of the clamped cosines.
        matmul_dtype: float32 or bfloat16.
        with_grad: whether to compute the gradient.

    Returns:
        The loss, a float32 scalar, and dloss/dz, [B, N, F] in `gradient_dtype` (empty without `with_grad`).
    """
    n_sequences, n_tokens, n_features = z.shape
    capability = torch.cuda.get_device_properties(z.device).major if z.is_cuda else 0
    side = tile_side(n_tokens, matmul_dtype, capability)
    n_blocks = triton.cdiv(n_tokens, side)
    n_tiles = n_blocks * (n_blocks + 1) // 2
    n_padded, f_padded = n_blocks * side, triton.cdiv(n_features, FEATURE_TILE) * FEATURE_TILE
    sizes = {"N_PADDED": n_padded, "F_PADDED": f_padded, "SIDE": side}
    at_once = sequences_at_once(n_sequences, n_tokens, matmul_dtype, side) if with_grad else max(1, n_sequences)

    u = z.new_empty(n_sequences, n_padded, f_padded, dtype=matmul_dtype)
    inverse, alignment = z.new_empty(2, n_sequences, n_padded, dtype=torch.float32)
    sums = z.new_empty(n_sequences, n_tiles, dtype=torch.float32)
    kept = n_sequences if with_grad else 0
    radial = z.new_empty(kept, n_blocks, n_padded, dtype=torch.float32)
    h = z.new_empty(at_once if with_grad else 0, n_padded, n_padded, dtype=matmul_dtype)
    dz = z.new_empty(z.shape if with_grad else 0, dtype=gradient_dtype(z.dtype))
    loss = z.new_empty((), dtype=torch.float32)

    edge = slope_at_edge(variant, tau, clamp)
    logarithmic, factor, offset = constants_of_loss(variant, tau, n_tokens)
    arcsin = arcsin_coefficients(clamp, exact=matmul_dtype == torch.float32)
    exponent = 1 / (tau * math.log(2)) * (1 / math.pi if variant == "angular" else 1)
    tiles = {"N_TILES": n_tiles, "TILES": triton.next_power_of_2(n_tiles)}
    block = triton.next_power_of_2(f_padded)
    rows = max(1, 4096 // block)

    n_rows = n_sequences * n_padded
    kernels.prepare[(triton.cdiv(n_rows, rows),)](
        z, u, inverse, alignment, *z.stride(), n_rows, n_tokens, n_features, n_padded, f_padded, rows, block
    )
    groups = (tensor.split(at_once) for tensor in (z, u, inverse, alignment, sums, radial, dz))
    for some_z, some_u, some_inverse, some_alignment, some_sums, some_radial, some_dz in zip(*groups, strict=True):
        n = some_z.size(0)
        kernels.pairs[(n * n_tiles,)](
            *(some_u, h, some_sums, some_radial, n_tokens, exponent, 1 / edge),
            *(variant, 1 - clamp, arcsin, with_grad),
            **sizes,
        )
        if with_grad:

            def grid(blocks: dict[str, int], n: int = n) -> tuple[int]:
                return (n * (n_padded // blocks["BLOCK_I"]) * triton.cdiv(n_features, blocks["BLOCK_F"]),)

            operands = (some_z, some_u, some_inverse, some_alignment, h, some_sums, some_radial, some_dz)
            share = factor * edge / n_sequences
            kernels.gradient[grid](
                *operands, *some_z.stride(), n_tokens, share, logarithmic, n_features, **sizes, **tiles
            )
    n_pairs = n_tokens * (n_tokens - 1)
    rows = max(1, 4096 // tiles["TILES"])
    kernels.mean_loss[(1,)](sums, loss, n_sequences, 1 / n_pairs, offset, logarithmic, **tiles, ROWS=rows)
    return loss, dz
