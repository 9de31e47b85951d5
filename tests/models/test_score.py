"""Log-likelihoods of continuations: those of one token at a time, for any batching and any number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import decided_model, loglikelihood

from nanodisp.models.gpt import GPT
from nanodisp.models.score import loglikelihoods


@pytest.fixture(scope="module")
def model() -> GPT:
    return decided_model()


short = st.lists(st.integers(0, 49), min_size=1, max_size=9)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(short, st.lists(st.integers(0, 49), max_size=15)), min_size=1, max_size=6), st.data())
def test_loglikelihoods_equal_those_of_one_token_at_a_time(
    model: GPT, pairs: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    likeliest = int(model(torch.tensor([pairs[0][0]])).logits[0, -1].argmax())
    pairs = [*pairs, (pairs[0][0], [likeliest])]
    n_ranks, at_once = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    parts = [
        loglikelihoods(model, pairs, tokens_at_once=at_once, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)
    ]
    expected = [loglikelihood(model, context, continuation) for context, continuation in pairs]
    totals, greedy = sum(part[0] for part in parts), sum(part[1].int() for part in parts)
    assert isinstance(totals, torch.Tensor)
    assert isinstance(greedy, torch.Tensor)
    assert totals.tolist() == pytest.approx([total for total, _ in expected], abs=1e-5)
    assert [bool(flag) for flag in greedy] == [flag for _, flag in expected]
    assert expected[-1][1]
