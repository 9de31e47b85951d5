"""The key-value cache: keys and values of earlier tokens, so that a new token costs one token's work."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SPAN = 256  # positions, the smallest span of a cache that attention reads


class Past(NamedTuple):
    """One layer of a `KVCache`, and how T new tokens use it.

    keys, values: [B, n_kv_head, span, head_dim], views of the cache that attention reads.
    positions: int64 [T], where the new tokens are written.
    mask: bool [T, span], what each of them attends to: the earlier tokens and itself.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mask: Tensor


class KVCache:
    """Keys and values of the tokens seen so far, for all layers: two [L, B, n_kv_head, block_size, head_dim].

    Attention reads a span of positions, the smallest power of two times `SPAN` that holds all tokens: a
    short context does not pay for a long one, and a compiled block sees few shapes.
    """

    def __init__(
        self,
        *,
        n_layer: int,
        batch_size: int,
        n_kv_head: int,
        block_size: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (n_layer, batch_size, n_kv_head, block_size, head_dim)
        # zeros: an attention weight of 0 times uninitialised memory could be NaN
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.arange(block_size, device=device)
        self.length = 0  # tokens in every layer

    def append(self, n_tokens: int) -> list[Past]:
        """Reserve positions for n_tokens more tokens, the same in every layer."""
        start, self.length = self.length, self.length + n_tokens
        span = SPAN
        while span < self.length:
            span *= 2
        positions = self.positions[start : self.length]
        mask = self.positions[:span] <= positions[:, None]
        return [
            Past(self.keys[layer, :, :, :span], self.values[layer, :, :, :span], positions, mask)
            for layer in range(len(self.keys))
        ]
