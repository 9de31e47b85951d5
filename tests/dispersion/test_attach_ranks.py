"""`attach` on two ranks, under DDP and FSDP: the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import attach_ranks
import forked
import pytest
import safetensors.torch
import torch
from attach_models import assert_differ, assert_equal, explicit, made, tokens
from attach_ranks import BATCHES, ROWS, TOKENS, WAYS
from torch import Tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    file = tmp_path_factory.mktemp("ranks") / "gradients.safetensors"
    for rank in forked.finish(forked.start_ranks(2, Path(attach_ranks.__file__), str(file))):
        assert rank.returncode == 0, rank.stderr
    return safetensors.torch.load_file(file)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: attach_ranks.name(*way))
def test_ranks_have_the_gradients_of_one_process(found: dict[str, Tensor], way: tuple[str, str, bool | None]) -> None:
    """All ranks draw the same tokens and directions, again when they recompute, and others for the second batch."""
    right = [torch.zeros_like(p) for p in made().parameters()]
    for i in range(BATCHES):
        settings = {"variant": way[1], "n_tokens": TOKENS}
        batch = explicit(tokens(ROWS, seed=i), times=1 / BATCHES, step=i + 1, **settings)
        assert_differ(batch, explicit(tokens(ROWS, seed=i), times=1 / BATCHES, step=i + 2, **settings))
        right = [a + b for a, b in zip(right, batch, strict=True)]
    assert_equal([found[f"{attach_ranks.name(*way)}-{i}"] for i in range(len(right))], right)
