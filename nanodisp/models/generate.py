"""Sampling tokens from a model, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanodisp.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Tensor]:
    """Continue `idx` (int64 [B, T], T >= 1), yielding the next tokens, int64 [B], one step at a time.

    The cache ends at block_size: when it is full, the last half of the context is read again from position 0, and
    generation continues from there.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: sample from the k likeliest tokens; None for all.
        top_p: sample from the likeliest tokens that together reach this probability.
        generator: on the model's device, or one per sequence, which makes each sequence's samples
            independent of the others.

    Raises ValueError for an encoder.
    """
    block_size = model.config.block_size
    cache = model.new_cache(idx.size(0))
    context = new = idx[:, -block_size:]
    for _ in range(max_new_tokens):
        if cache.length == block_size:
            cache.length, new = 0, context[:, -max(1, block_size // 2) :]
        logits = model(new, cache=cache).logits
        token = sample_token(logits[:, -1], temperature, top_k, top_p, generator)
        yield token
        new = token[:, None]
        context = torch.cat([context, new], dim=1)[:, -block_size:]


def sample_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """Sample from logits [B, V]: int64 [B]; with B generators each row uses its own."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        likeliest, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = likeliest.cumsum(dim=-1) - likeliest >= top_p  # tokens after top_p is reached
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    probabilities = logits.softmax(dim=-1)
    if not isinstance(generator, Sequence):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    rows = zip(probabilities, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])
