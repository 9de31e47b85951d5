"""Batches: every window once an epoch, a function of (seed, step) alone, the same for any ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodisp.data import shards
from nanodisp.data.batches import Batches, permute, prefetch, spread_windows
from nanodisp.data.corpus import open_corpus
from nanodisp.errors import UserError


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> shards.Tokens:
    """Tokens 0, 1, 2, ... over three shards: a token tells its own position."""
    folder = tmp_path_factory.mktemp("counting")
    for i, piece in enumerate(np.array_split(np.arange(1000, dtype=np.uint16), [301, 317])):
        shards.write_shard(folder / f"train_{i}.bin", piece)
    return shards.open_split(folder, "train")


def loader(tokens: shards.Tokens, block_size: int = 7, batch_size: int = 12, seed: int = 0) -> Loader:
    return Batches(tokens, block_size=block_size, batch_size=batch_size, seed=seed, vocab_size=1000)


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_permute_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, (seed, epoch)).tolist()) == list(range(n))


def test_permute_mixes_well_and_anew_for_every_key() -> None:
    orders = [permute(np.arange(10_000), 10_000, (seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    orders.append(np.arange(10_000))
    correlations = np.corrcoef(orders) - np.eye(5)
    assert np.abs(correlations).max() < 0.05
    assert np.abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 0.05  # neighbours part


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 1000))
def test_every_window_of_an_epoch_comes_exactly_once(
    counting: shards.Tokens, block_size: int, batch_size: int, seed: int
) -> None:
    data = loader(counting, block_size, batch_size, seed)
    steps = -(-2 * data.n_windows // batch_size)
    drawn = np.concatenate([data.windows(step) for step in range(steps)])
    for epoch in range(2):
        visited = drawn[epoch * data.n_windows : (epoch + 1) * data.n_windows]
        assert sorted(visited.tolist()) == list(range((1000 - 1) // block_size))


def test_targets_are_the_window_one_token_on_across_shards_too(counting: shards.Tokens) -> None:
    for step in range(12):
        x, y = loader(counting).batch(step)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x + 1, y)
        assert torch.equal(x, x[:, :1] + torch.arange(7))
        assert (x[:, 0] % 7 == 0).all()


def test_a_batch_is_a_function_of_seed_and_step(counting: shards.Tokens) -> None:
    first = loader(counting)
    for step in (5, 0, 5):
        assert torch.equal(first.batch(step)[0], loader(counting).batch(step)[0])
    assert not torch.equal(first.batch(0)[0], first.batch(1)[0])
    assert not torch.equal(first.batch(0)[0], loader(counting, seed=1).batch(0)[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(10, 200), st.integers(1, 1500), st.lists(st.integers(0, 5000), min_size=1, max_size=5))
def test_windows_worked_out_together_are_those_one_by_one(
    counting: shards.Tokens, block_size: int, batch_size: int, steps: list[int]
) -> None:
    data = loader(counting, block_size, batch_size, seed=3)
    for step in steps:
        for i, window in enumerate(data.windows(step).tolist()[:5], start=step * batch_size):
            epoch, index = divmod(i, data.n_windows)
            assert window == permute(np.array([index]), data.n_windows, (3, epoch))[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_any_number_of_ranks_sees_the_same_global_batch(counting: shards.Tokens, world_size: int) -> None:
    data = loader(counting)
    parts = [data.batch(3, rank, world_size)[0] for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), data.batch(3)[0])


def test_prefetch_gives_the_batches_of_its_steps(counting: shards.Tokens) -> None:
    data = loader(counting)
    for step, (x, y) in zip(range(4, 8), prefetch(data, range(4, 8), torch.device("cpu")), strict=True):
        assert torch.equal(x, data.batch(step)[0])
        assert torch.equal(y, data.batch(step)[1])


def test_validation_windows_are_spread_evenly() -> None:
    assert spread_windows(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread_windows(3, 5).tolist() == spread_windows(3, None).tolist() == [0, 1, 2]


def test_a_corpus_shorter_than_a_window_is_refused(counting: shards.Tokens) -> None:
    assert loader(counting, block_size=999).n_windows == 1
    with pytest.raises(UserError, match="block_size=1000 needs 1001 tokens"):
        loader(counting, block_size=1000)


def test_a_token_outside_the_vocabulary_is_named(counting: shards.Tokens) -> None:
    data = Batches(counting, block_size=7, batch_size=100, seed=0, vocab_size=500)
    with pytest.raises(UserError, match="vocabulary ends at 499"):
        for step in range(10):
            data.batch(step)


def test_a_corpus_tells_its_tokenizer_and_its_bytes_per_token(tmp_path: Path) -> None:
    described = open_corpus(write_corpus(tmp_path), "gpt2")
    assert (described.tokenizer, described.vocab_size, described.bytes_per_token) == ("byte", 257, 1.0)
    (tmp_path / "manifest.json").unlink()
    bare = open_corpus(tmp_path, "gpt2")
    assert (bare.tokenizer, bare.vocab_size, bare.bytes_per_token) == ("gpt2", None, None)
    assert len(bare.train) == 5000
