"""Hugging Face's tokenizer.json as a tokenizer: its own tokens, its own end of text, no special token out of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_json_tokenizer

from nanodisp.data.corpus import open_corpus, sample_start
from nanodisp.data.prepare import DataConfig, prepare
from nanodisp.data.shards import Manifest, open_split
from nanodisp.data.tokenizer import Tokenizer, identity, load_tokenizer
from nanodisp.data.tokenizer_json import JsonTokenizer
from nanodisp.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

END, START, THINK = 1, 0, 300  # ids of write_json_tokenizer
PIECES = st.sampled_from(["the ", "12 34", "  5", "<|end|>", "<|start|>", "<think>", "é", " \n", "th"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json_tokenizer(tmp_path_factory.mktemp("json") / "tiny-1.5")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def change(folder: Path, name: str, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    file = folder / name
    found = {**(json.loads(file.read_text()) if file.exists() else {}), **values}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def rejected(spec: Path) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(spec)
    assert "\n" not in str(error.value) and spec.name in str(error.value)
    return str(error.value)


# --- text and tokens --------------------------------------------------------------------------


@given(st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join))
def test_any_text_has_the_files_own_tokens_and_comes_back(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == theirs.encode(text, add_special_tokens=False).ids and tokens.dtype == np.uint16
    assert tokenizer.decode_bytes(tokens).decode() == text


def test_the_names_of_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a<|end|>b<|start|>")
    assert not {END, START} & set(tokens.tolist())
    assert tokenizer.decode_bytes(tokens) == b"a<|end|>b<|start|>"


def test_a_token_that_is_added_but_not_special_is_its_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<think>").tolist() == [THINK]
    assert tokenizer.decode_bytes([THINK]) == b"<think>"


def test_special_and_unknown_tokens_give_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode_bytes([START, *tokenizer.encode("ab").tolist(), END, 299, 301, 70_000]) == b"ab"
    assert tokenizer.vocab_size == 301, "ids need not be consecutive"


def test_a_lone_surrogate_becomes_a_question_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode("a\ud800b")) == b"a?b"


def test_a_byte_that_the_vocabulary_lacks_is_dropped(folder: Path, tmp_path: Path) -> None:
    small = write_json_tokenizer(tmp_path / "small", lacking=b"q")
    tokenizer = load_tokenizer(small)
    assert tokenizer.decode_bytes(tokenizer.encode("aqb")) == b"ab"


def test_what_a_file_puts_around_a_text_or_cuts_off_is_left_out(folder: Path, tokenizer: Tokenizer) -> None:
    file = json.loads((folder / "tokenizer.json").read_text())
    assert file["truncation"]["max_length"] == 4 and file["padding"] and file["post_processor"]
    assert len(tokenizer.encode("a b c d e f")) == 11
    assert tokenizer.encode("").tolist() == []


def test_a_large_vocabulary_needs_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path / "large", think=70_000))
    assert tokenizer.encode("<think>").tolist() == [70_000] and tokenizer.encode("a").dtype == np.uint32


# --- the file and its end of text -------------------------------------------------------------


def test_a_spec_is_the_folder_or_its_file(folder: Path, tokenizer: Tokenizer) -> None:
    named = load_tokenizer(str(folder / "tokenizer.json"))
    assert named.name == tokenizer.name == "tiny-1.5"
    assert load_tokenizer("tokenizer.json", folder).encode("the").tolist() == named.encode("the").tolist()


@pytest.mark.parametrize(
    ("settings", "config", "end"),
    [
        ({"eos_token": "<|start|>"}, {"eos_token_id": END}, START),
        ({"eos_token": {"content": "<|start|>"}}, {}, START),
        ({"eos_token": None}, {"eos_token_id": START}, START),
        ({"eos_token": None}, {"eos_token_id": [START, END]}, START),
    ],
    ids=str,
)
def test_the_end_of_text_is_what_the_models_files_say(
    tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], end: int
) -> None:
    folder = write_json_tokenizer(tmp_path / "model")
    change(folder, "tokenizer_config.json", **settings)
    change(folder, "config.json", **config)
    assert load_tokenizer(folder).eot == end


@pytest.mark.parametrize(
    ("settings", "config", "words"),
    [
        ({"eos_token": None}, {}, "has no known end-of-text token: name it as eos_token in"),
        ({"eos_token": None}, {"eos_token_id": 999}, "has no known end-of-text token"),
        ({"eos_token": None}, {"eos_token_id": []}, "cannot be read as a tokenizer"),
        ({"eos_token": "<|never|>"}, {}, "its end-of-text token <|never|> is not one of its special tokens"),
        ({"eos_token": "<think>"}, {}, "its end-of-text token <think> is not one of its special tokens"),
        ({"eos_token": "th"}, {}, "its end-of-text token th is not one of its special tokens"),
    ],
    ids=str,
)
def test_a_file_without_a_usable_end_of_text_is_rejected(
    tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    folder = write_json_tokenizer(tmp_path / "model")
    change(folder, "tokenizer_config.json", **settings)
    change(folder, "config.json", **config)
    assert words in rejected(folder)


def test_other_kinds_of_tokenizers_are_rejected(tmp_path: Path) -> None:
    folder = write_json_tokenizer(tmp_path / "model")
    kinds = tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), tokenizers.models.BPE({"▁a": 0}, [])
    for model in kinds:  # BERT's, and a BPE of characters such as LLaMA 2's
        other = tokenizers.Tokenizer(model)
        other.add_special_tokens(["<|end|>"])
        other.save(str(folder / "tokenizer.json"))
        assert "is not a byte-level BPE" in rejected(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 1, "added_tokens": []}', "[" * 100_000], ids=len)
def test_a_damaged_file_is_reported(tmp_path: Path, content: str) -> None:
    folder = write_json_tokenizer(tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    assert "cannot be read" in rejected(folder)


def test_a_missing_file_and_a_folder_without_one_are_reported(tmp_path: Path) -> None:
    assert "cannot be read" in rejected(tmp_path / "none.json")
    assert "is unknown; choose byte, gpt2, or the path of" in rejected(tmp_path)


# --- shards made with it ----------------------------------------------------------------------


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> Path:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(f"the words of {name} 12 ")
    return prepare(config(folder, tmp_path))


def config(spec: Path, root: Path) -> DataConfig:
    files = {"path": str(root), "folder": str(root / "prepared"), "val_fraction": 0.5}
    return DataConfig(name="text", tokenizer=str(spec), **files)  # type: ignore[arg-type]


def test_a_prepared_folder_keeps_the_file_and_its_end_of_text(folder: Path, prepared: Path) -> None:
    assert "-tiny-1.5-" in prepared.name
    assert (prepared / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    manifest = Manifest.load(prepared)
    assert (manifest.tokenizer, manifest.vocab_size) == ("tokenizer.json", 301)
    kept, tokens = load_tokenizer(manifest.tokenizer, prepared), open_split(prepared, "train")
    assert isinstance(kept, JsonTokenizer) and kept.eot == END
    split = tokens.read(0, len(tokens)).tolist()
    assert split.count(END) == 2 and split[-1] == END
    assert kept.decode_bytes(split).startswith(b"the words of")


def test_a_prepared_folder_keeps_an_end_of_text_that_only_the_models_config_knows(tmp_path: Path) -> None:
    model = write_json_tokenizer(tmp_path / "model")
    (model / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    change(model, "config.json", eos_token_id=START)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the words of {name} 12 ")
    prepared = prepare(config(model, tmp_path))
    assert load_tokenizer(prepared).eot == START
    kept = json.loads((prepared / "tokenizer_config.json").read_text())
    assert kept == {"model_max_length": 64, "eos_token": "<|start|>"}


def test_a_sample_begins_with_the_files_own_end_of_text(prepared: Path) -> None:
    corpus = open_corpus(prepared, "byte")
    assert corpus.tokenizer == str(prepared / "tokenizer.json")
    assert sample_start(corpus) == END, "the last token of the vocabulary is <think>"


def test_another_file_or_another_end_of_text_is_another_corpus(folder: Path, prepared: Path, tmp_path: Path) -> None:
    other = write_json_tokenizer(tmp_path / "tiny-1.5")
    assert identity(str(other)) == identity(str(folder / "tokenizer.json"))
    assert prepare(config(other, tmp_path)) == prepared
    change(other, "tokenizer_config.json", eos_token="<|start|>")
    assert prepare(config(other, tmp_path)) != prepared
