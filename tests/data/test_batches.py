"""Batches: every window once per epoch, a function of (seed, step) only, the same for any number of ranks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodisp.data import shards
from nanodisp.data.batches import Batches, mask_tokens, permute, prefetch, spread_windows
from nanodisp.data.corpus import open_corpus
from nanodisp.errors import UserError


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> shards.Tokens:
    """Tokens 0, 1, 2, ... over three shards: each token is its own position."""
    folder = tmp_path_factory.mktemp("counting")
    for i, piece in enumerate(np.array_split(np.arange(1000, dtype=np.uint16), [301, 317])):
        shards.write_shard(folder / f"train_{i}.bin", piece)
    return shards.open_split(folder, "train")


def batches_of(
    tokens: shards.Tokens, block_size: int = 7, batch_size: int = 12, seed: int = 0, masked: bool = False
) -> Batches:
    return Batches(tokens, block_size=block_size, batch_size=batch_size, seed=seed, vocab_size=1000, masked=masked)


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_permute_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, (seed, epoch)).tolist()) == list(range(n))


def test_permute_mixes_well_and_differently_for_every_key() -> None:
    orders = [permute(np.arange(10_000), 10_000, (seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    orders.append(np.arange(10_000))
    correlations = np.corrcoef(orders) - np.eye(5)
    assert np.abs(correlations).max() < 0.05
    assert np.abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 0.05  # neighbours are separated


@pytest.mark.parametrize(
    ("n", "first"),
    [(10, [4, 8, 1, 6, 0]), (2**33, [6506930752, 5352982843, 3521171153, 2047944236, 1770269508])],
)
def test_the_order_is_the_same_in_every_version(n: int, first: list[int]) -> None:
    """Otherwise a run resumed with another version would see some windows twice and others never."""
    assert permute(np.arange(5), n, (1337, 2)).tolist() == first


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 1000))
def test_every_window_of_an_epoch_comes_exactly_once(
    counting: shards.Tokens, block_size: int, batch_size: int, seed: int
) -> None:
    batches = batches_of(counting, block_size, batch_size, seed)
    steps = -(-2 * batches.n_windows // batch_size)
    drawn = np.concatenate([batches.windows(step) for step in range(steps)])
    for epoch in range(2):
        visited = drawn[epoch * batches.n_windows : (epoch + 1) * batches.n_windows]
        assert sorted(visited.tolist()) == list(range((1000 - 1) // block_size))


def test_targets_are_the_window_shifted_by_one_token_also_across_shards(counting: shards.Tokens) -> None:
    for step in range(12):
        x, y = batches_of(counting).batch(step)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x + 1, y)
        assert torch.equal(x, x[:, :1] + torch.arange(7))
        assert (x[:, 0] % 7 == 0).all()


def test_a_batch_is_a_function_of_seed_and_step(counting: shards.Tokens) -> None:
    first = batches_of(counting)
    for step in (5, 0, 5):
        assert torch.equal(first.batch(step)[0], batches_of(counting).batch(step)[0])
    assert not torch.equal(first.batch(0)[0], first.batch(1)[0])
    assert not torch.equal(first.batch(0)[0], batches_of(counting, seed=1).batch(0)[0])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(10, 200), st.integers(1, 1500), st.lists(st.integers(0, 5000), min_size=1, max_size=5))
def test_windows_computed_together_equal_those_computed_one_by_one(
    counting: shards.Tokens, block_size: int, batch_size: int, steps: list[int]
) -> None:
    batches = batches_of(counting, block_size, batch_size, seed=3)
    for step in steps:
        for i, window in enumerate(batches.windows(step).tolist()[:5], start=step * batch_size):
            epoch, index = divmod(i, batches.n_windows)
            assert window == permute(np.array([index]), batches.n_windows, (3, epoch))[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_any_number_of_ranks_sees_the_same_global_batch(counting: shards.Tokens, world_size: int, masked: bool) -> None:
    batches = batches_of(counting, masked=masked)
    parts = [batches.batch(3, rank, world_size) for rank in range(world_size)]
    for ours, whole in zip(zip(*parts, strict=True), batches.batch(3), strict=True):
        assert [len(part) for part in ours] == [12 // world_size] * world_size
        assert torch.equal(torch.cat(ours), whole)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_every_masked_sequence_has_as_many_targets_and_the_other_tokens_are_as_they_were(
    n_tokens: int, vocab_size: int, seed: int, row: int
) -> None:
    text = torch.arange(3 * n_tokens).view(3, n_tokens) % vocab_size
    x, y = mask_tokens(text, np.arange(row, row + 3), (seed, 5), vocab_size)
    assert x.dtype == y.dtype == torch.int64
    chosen = y != -100
    assert chosen.sum(dim=1).tolist() == [max(1, round(0.15 * n_tokens))] * 3
    assert torch.equal(y[chosen], text[chosen]) and torch.equal(x[~chosen], text[~chosen])
    assert x.min() >= 0 and x.max() <= vocab_size


def test_targets_are_hidden_replaced_or_kept_in_berts_proportions_and_spread_evenly() -> None:
    text = torch.full((2000, 40), 7)
    x, y = mask_tokens(text, np.arange(2000), (1, 2), 50)
    chosen = y != -100
    assert chosen.float().mean(dim=0) == pytest.approx(torch.full((40,), 0.15), abs=0.035), "every place"
    hidden, kept = (x[chosen] == 50).float().mean().item(), (x[chosen] == 7).float().mean().item()
    assert (hidden, kept) == pytest.approx((0.8, 0.1 + 0.1 / 50), abs=0.01)
    counts = torch.bincount(x[chosen][(x[chosen] != 50) & (x[chosen] != 7)], minlength=50)
    assert (counts == 0).nonzero().tolist() == [[7]], "any token of the vocabulary"
    assert counts.max() < 3 * counts.sum() / 49


def test_masks_are_a_function_of_seed_step_and_row(counting: shards.Tokens) -> None:
    masked = lambda step, seed: batches_of(counting, 200, seed=seed, masked=True).batch(step)[1] != -100  # noqa: E731
    assert torch.equal(masked(3, 1), masked(3, 1))
    masks = [row for each in (masked(3, 1), masked(4, 1), masked(3, 2)) for row in each]
    both = [(a & b).sum().item() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(both) < 18, "4.5 of 30 by chance"


def test_masks_are_the_same_in_every_version() -> None:
    """Otherwise a run resumed with another version would have other masks."""
    x, y = mask_tokens(torch.arange(40)[None], np.array([3]), (1337, 2), 50)
    places = (y[0] != -100).nonzero()[:, 0].tolist()
    assert (places, x[0, places].tolist()) == ([12, 22, 23, 25, 28, 35], [50, 50, 13, 25, 50, 50])


def test_prefetch_yields_the_batches_of_its_steps(counting: shards.Tokens) -> None:
    batches = batches_of(counting)
    for step, (x, y) in zip(range(4, 8), prefetch(batches, range(4, 8), torch.device("cpu")), strict=True):
        assert torch.equal(x, batches.batch(step)[0])
        assert torch.equal(y, batches.batch(step)[1])


def test_prefetch_reads_one_batch_ahead(counting: shards.Tokens) -> None:
    read: list[int] = []

    class Recorded(Batches):
        def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
            read.append(step)
            return super().batch(step, rank, world_size)

    batches = Recorded(counting, block_size=7, batch_size=12, seed=0, vocab_size=1000)
    ahead = prefetch(batches, range(4, 8), torch.device("cpu"), 1, 3)
    x, _ = next(ahead)
    ahead.close()  # waits for the thread
    assert torch.equal(x, batches_of(counting).batch(4, 1, 3)[0])
    assert read == [4, 5]


def test_validation_windows_are_spread_evenly() -> None:
    assert spread_windows(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread_windows(3, 5).tolist() == spread_windows(3, None).tolist() == [0, 1, 2]


def test_a_split_shorter_than_a_window_is_rejected(tmp_path: Path) -> None:
    val = open_corpus(write_corpus(tmp_path, n_val=500), "byte").val
    assert batches_of(val, block_size=499).n_windows == 1
    message = f"block_size=500 needs 501 tokens, but a split of {tmp_path} has 500 (val_000000.bin): use a smaller"
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        batches_of(val, block_size=500)
    assert "val_fraction" not in str(caught.value), "which is an error where file names decide"


def test_a_token_outside_the_vocabulary_is_reported(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "train.bin", np.arange(1000, dtype=np.uint16))
    batches = Batches(shards.open_split(tmp_path, "train"), block_size=7, batch_size=100, seed=0, vocab_size=500)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))} holds token \d+, .*vocabulary ends at 499"):
        for step in range(10):
            batches.batch(step)


def test_a_corpus_knows_its_tokenizer_and_its_bytes_per_token(tmp_path: Path) -> None:
    described = open_corpus(write_corpus(tmp_path), "gpt2")
    assert (described.tokenizer, described.vocab_size, described.bytes_per_token) == ("byte", 257, 1.0)
    (tmp_path / "manifest.json").unlink()
    bare = open_corpus(tmp_path, "gpt2")
    assert (bare.tokenizer, bare.vocab_size, bare.bytes_per_token) == ("gpt2", None, None)
    assert len(bare.train) == 5000
