"""The data of a run are found again, and documents are read from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_corpus
from tiny_models import write_ranks_file

from nanodisp.data import shards
from nanodisp.data.prepare import DataConfig
from nanodisp.data.tokenizer import ByteTokenizer
from nanodisp.errors import UserError
from nanodisp.hf import corpus
from nanodisp.hf.corpus import folder_of_data, read_some_documents
from nanodisp.hf.open import Measurable, open_for_measuring


def subject(**given: object) -> Measurable:
    return Measurable("some run", torch.nn.Identity(), 8, 257, lambda text: np.empty(0), Path(), **given)  # type: ignore[arg-type]


def test_the_runs_own_folder_is_found_unless_its_tokens_have_changed(trained: Path, tmp_path: Path) -> None:
    opened = open_for_measuring(str(trained))
    assert folder_of_data(opened, "do this").name == opened.corpus
    opened.fingerprint = "another"
    with pytest.raises(UserError, match=r"has changed since run at step 3 was trained on it: do this$"):
        folder_of_data(opened, "do this")
    opened.corpus = "another"
    with pytest.raises(UserError, match=r"is not what run at step 3 was trained on, another: do this$"):
        folder_of_data(opened, "do this")
    with pytest.raises(UserError, match=r"^some run comes without data: do this$"):
        folder_of_data(subject(), "do this")
    missing = DataConfig(name="shards", path=str(tmp_path / "missing"))
    with pytest.raises(
        UserError, match=r"^the data of some run cannot be read \(.*missing is not a folder\): do this$"
    ):
        folder_of_data(subject(data=missing), "do this")


def test_documents_are_read_from_parts_spread_over_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNKS", 2)
    monkeypatch.setattr(corpus, "CHUNK", 10)
    folder = write_corpus(tmp_path / "corpus")
    tokens = np.arange(40, dtype=np.uint16)
    tokens[[3, 4, 29]] = 256  # end-of-text
    shards.write_shard(folder / "val_000000.bin", tokens)
    entries = [shards.describe_shard(folder / f"{split}_000000.bin", split) for split in ("train", "val")]
    shards.Manifest("byte", 257, "made by a test", {}, entries).save(folder)
    found = [document.tolist() for document in read_some_documents(folder, "val", ByteTokenizer(), 257)]
    assert found == [[0, 1, 2], [5, 6, 7, 8, 9], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
    with pytest.raises(UserError, match="holds token 256, but the vocabulary ends at 255"):
        list(read_some_documents(folder, "val", ByteTokenizer(), 256))


def test_a_folder_of_shards_is_found_by_the_name_of_the_runs_tokenizer(
    tmp_path: Path, run: Callable[..., Path]
) -> None:
    """The run has a copy of the tokenizer's file under another name."""
    ranks = write_ranks_file(tmp_path / "some_name.tiktoken")
    (tmp_path / "text.txt").write_text("the cat and the dog\n" * 300)
    settings = {"path": str(tmp_path / "text.txt"), "tokenizer": str(ranks), "folder": str(tmp_path / "shards")}
    overrides = [f"data.{key}={value}" for key, value in settings.items()]
    trained = run("data=text", *overrides, "train.steps=1", "train.sample_tokens=0")
    opened = open_for_measuring(str(trained))
    folder = folder_of_data(opened, "do this")
    assert list((tmp_path / "shards").iterdir()) == [folder], "nothing was prepared again"
    ranks.unlink()
    assert folder_of_data(open_for_measuring(str(trained)), "do this") == folder
    shutil.rmtree(folder)
    again = folder_of_data(open_for_measuring(str(trained)), "do this")
    assert again.name != folder.name, "by the copy's name"
    assert again.is_dir()
