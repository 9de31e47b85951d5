"""Opening a corpus: which rank prepares it."""

import contextlib

import pytest
import torch
from test_prepare import config

from nanodisp.data import corpus
from nanodisp.data.prepare import prepare
from nanodisp.distributed import World


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 1), (2, 0, 1), (3, 1, 2)])
def test_the_first_rank_of_each_machine_prepares_the_data_and_the_others_find_it(
    rank, local_rank, turn, tmp_path, monkeypatch
):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be. " * 200)
    turns, prepared = 0, []

    @contextlib.contextmanager
    def together(_):
        nonlocal turns
        turns += 1
        yield

    def prepare_and_note(config):
        prepared.append(turns)
        return prepare(config)

    monkeypatch.setattr(World, "together", together)
    monkeypatch.setattr(corpus, "prepare", prepare_and_note)
    world = World(rank, 4, torch.device("cpu"), local_rank)
    assert len(corpus.open_for(config(tmp_path, text, tokenizer="byte"), world).train) > 3000
    assert prepared == [turn]
    assert turns == 2, "every rank waits twice"
