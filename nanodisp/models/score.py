"""Log-likelihoods of texts under a model, in batches of similar length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanodisp.models.gpt import GPT

TOKENS_AT_ONCE = 4096  # per forward pass, whose logits are all in memory


@torch.no_grad()
def loglikelihoods(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    rank: int = 0,
    n_ranks: int = 1,
    progress: Callable[[list[list[int]]], Iterable[list[int]]] = iter,
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of continuations.

    Args:
        model: in eval mode.
        pairs: tokens of a context (at least one) and of its continuation. Pairs longer than block_size + 1 tokens
            lose their beginning.
        tokens_at_once: per forward pass, padding included; a single row may have more.
        rank, n_ranks: only this rank's share is computed, the rest stays 0. With FSDP all ranks must call it.
        progress: wraps the iteration over batches.

    Returns: log-likelihoods in nats, float64 [len(pairs)], and whether greedy decoding gives the continuation,
    bool [len(pairs)].
    """
    device, longest = model.device, model.config.block_size + 1
    rows = [[*context, *continuation][-longest:] for context, continuation in pairs]
    batches: list[list[int]] = []  # of indices into pairs, similar lengths together, longest first
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > tokens_at_once:
            batches.append([])
        batches[-1].append(i)
    totals = torch.zeros(len(rows), dtype=torch.float64, device=device)
    greedy = torch.zeros(len(rows), dtype=torch.bool, device=device)
    rounds = math.ceil(len(batches) / n_ranks) * n_ranks  # FSDP needs all ranks in every forward pass
    for number, batch in enumerate(progress([*batches, *batches[:1] * (rounds - len(batches))])):
        if number % n_ranks != rank:
            continue
        T = max(len(rows[batch[0]]) - 1, 1)
        x = torch.zeros(len(batch), T, dtype=torch.long)  # [B, T], padded on the right, unseen by causal attention
        y, asked = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
        for b, i in enumerate(batch):
            row, n = rows[i], min(len(pairs[i][1]), len(rows[i]) - 1)
            x[b, : len(row) - 1], y[b, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
            asked[b, len(row) - 1 - n : len(row) - 1] = True
        x, y, asked = x.to(device), y.to(device), asked.to(device)
        logits, targets = model(x, at=asked).logits.float(), y[asked]  # [n, V], [n]
        if number >= len(batches):
            continue
        of_token = torch.zeros(x.shape, dtype=torch.float64, device=device)
        of_token[asked] = -F.cross_entropy(logits, targets, reduction="none").double()
        missed = torch.zeros_like(asked)
        missed[asked] = logits.argmax(dim=-1) != targets
        totals[batch], greedy[batch] = of_token.sum(dim=1), ~missed.any(dim=1)
    return totals, greedy
