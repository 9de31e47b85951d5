"""Batches as a pure function of (seed, step).

The corpus is cut into consecutive windows of block_size tokens. An epoch visits every
window exactly once, in an order determined by (seed, epoch); sequence i of the run
is window i mod W of epoch i div W. So a resumed run needs no loader state, and any number
of ranks or micro-batches sees the same global batch. Windows may span documents.

An encoder's batches hide some of the tokens, which are its targets: `mask_tokens`.

The order is a Feistel network on the window's number, not a shuffled list: constant
memory for a corpus of any size, and the same order with every version of numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from nanodisp.data.shards import Tokens, check_tokens
from nanodisp.distributed import hardware
from nanodisp.errors import UserError
from nanodisp.models.head import IGNORED

FEISTEL_ROUNDS = 6
AT_ONCE = 1024  # windows whose order is computed together: for a few at a time, the overhead of numpy's calls dominates
MASKED, HIDDEN, REPLACED = 0.15, 0.8, 0.1  # shares: of tokens that an encoder predicts; of those


class Batches:
    """Global batches of windows drawn from one split.

    Args:
        tokens: the split.
        block_size: tokens per window; its targets are the same window shifted by one token.
        batch_size: sequences per global batch.
        seed: determines the order, and the masks.
        vocab_size: every token id must be below it.
        masked: whether batches are an encoder's, see `mask_tokens`.

    Raises UserError when the split is shorter than one window.
    """

    def __init__(
        self, tokens: Tokens, *, block_size: int, batch_size: int, seed: int, vocab_size: int, masked: bool = False
    ) -> None:
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed, self.vocab_size, self.masked = seed, vocab_size, masked
        self.n_windows = count_windows(tokens, block_size)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))  # the last group of steps, and its windows

    def windows(self, step: int) -> np.ndarray:
        """The windows of the global batch of `step` (from 0), int64 [batch_size]."""
        steps = -(-AT_ONCE // self.batch_size)
        group, row = divmod(step, steps)
        known, order = self._order
        if group != known:
            order = self._order_of(group * steps, (group + 1) * steps)
            self._order = (group, order)
        return order[row]

    def _order_of(self, start: int, stop: int) -> np.ndarray:
        """The windows of steps start to stop - 1, int64 [stop - start, batch_size]."""
        sequence = np.arange(start * self.batch_size, stop * self.batch_size)
        epoch, index = np.divmod(sequence, self.n_windows)
        chosen = np.empty_like(index)
        for e in range(epoch[0], epoch[-1] + 1):
            chosen[epoch == e] = permute(index[epoch == e], self.n_windows, (self.seed, e))
        return chosen.reshape(-1, self.batch_size)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """This rank's rows of the global batch of `step`: idx and targets, int64 [batch_size / world_size, T].

        Raises UserError for a token id outside the vocabulary.
        """
        n_rows = self.batch_size // world_size
        rows = np.arange(rank * n_rows, (rank + 1) * n_rows)
        x, y = read_windows(self.tokens, self.windows(step)[rows], self.block_size, self.vocab_size)
        return mask_tokens(x, rows, (self.seed, step), self.vocab_size) if self.masked else (x, y)


def count_windows(tokens: Tokens, block_size: int) -> int:
    """The number of complete windows (with their last target) in a split; raises UserError when it is 0."""
    n_windows = (len(tokens) - 1) // block_size
    if n_windows < 1:
        raise UserError(
            f"model.block_size={block_size} needs {block_size + 1} tokens, but a split of {tokens.paths[0].parent} "
            f"has {len(tokens)} ({tokens.paths[0].name}): use a smaller block_size, more text, or another split of it"
        )
    return n_windows


def read_windows(tokens: Tokens, windows: np.ndarray, block_size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """idx and targets of these windows, int64 [len(windows), T]; raises UserError for an id outside the vocabulary."""
    rows = np.empty((len(windows), block_size + 1), dtype=tokens.dtype)
    for row, window in zip(rows, windows.tolist(), strict=True):
        row[:] = tokens.read(window * block_size, (window + 1) * block_size + 1)
    check_tokens(rows, vocab_size, tokens.paths[0].parent)
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))


def count_masked(n_tokens: int) -> int:
    """How many tokens of a sequence an encoder predicts: the same number in all, so that means of means are exact."""
    return max(1, round(MASKED * n_tokens))


def mask_tokens(x: Tensor, rows: np.ndarray, key: tuple[int, ...], vocab_size: int) -> tuple[Tensor, Tensor]:
    """BERT's input and targets (arXiv 1810.04805), int64 [B, T], for the tokens x [B, T].

    `count_masked(T)` tokens of each sequence are targets, the others `IGNORED`. Of these, 80% are hidden by the token
    `vocab_size`, 10% are replaced by a random one, and 10% stay. Everything is drawn from `key` (non-negative integers)
    and the sequence's number in `rows`, int64 [B].
    """
    idx = x.numpy()
    n_draws = np.uint64(3 * idx.shape[1])
    begin = np.random.SeedSequence(key).generate_state(1, np.uint64) + rows.astype(np.uint64) * n_draws
    counter = begin[:, None] + np.arange(n_draws, dtype=np.uint64)
    where, how, which = np.split(_mix(counter * np.uint64(0x9E3779B97F4A7C15)), 3, axis=1)  # SplitMix64: uint64 [B, T]
    n = count_masked(idx.shape[1])
    chosen = np.zeros(idx.shape, dtype=bool)
    np.put_along_axis(chosen, np.argpartition(where, n - 1, axis=1)[:, :n], True, axis=1)
    share, random = how / 2.0**64, (which % np.uint64(vocab_size)).astype(np.int64)
    masked = np.where(chosen & (share < HIDDEN + REPLACED), np.where(share < HIDDEN, vocab_size, random), idx)
    return torch.from_numpy(masked), torch.from_numpy(np.where(chosen, idx, IGNORED))


def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of range(n), determined by `key` (non-negative integers), applied to `index`.

    A balanced Feistel network over the smallest even number of bits that holds n - 1,
    applied again to any value outside the range (cycle walking, Black & Rogaway 2002).
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)

    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value[outside] = left << half | right
        outside = value >= n
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of x affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def prefetch(
    batches: Batches, steps: Iterable[int], device: torch.device, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `steps` on `device`, read one ahead in a thread; on CUDA from pinned memory."""

    def read(step: int) -> tuple[Tensor, Tensor]:
        x, y = batches.batch(step, rank, world_size)
        return hardware.pinned(x, device), hardware.pinned(y, device)

    def sent(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        return hardware.send(x, device), hardware.send(y, device)

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = None
        for step in steps:
            current, ahead = ahead, reader.submit(read, step)
            if current is not None:
                yield sent(current.result())
        if ahead is not None:
            yield sent(ahead.result())


def spread_windows(n_windows: int, wanted: int | None) -> np.ndarray:
    """`wanted` window numbers spread evenly over n_windows (None: all), int64: a fixed validation set."""
    if wanted is None or wanted >= n_windows:
        return np.arange(n_windows)
    return np.arange(wanted) * n_windows // wanted
