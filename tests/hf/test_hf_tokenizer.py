"""Tokenizers built for Hugging Face, from any vocabulary; those of exported runs are in test_export_import.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SINGLE_BYTES, export, write_checkpointed_run

from nanodisp.data.tokenizer import from_ranks
from nanodisp.errors import UserError
from nanodisp.hf import __main__ as hf
from nanodisp.hf.tokenizer import build_tokenizer, merged_from
from nanodisp.runs import checkpoint

transformers = pytest.importorskip("transformers")


@given(st.lists(st.text("ab", min_size=2, max_size=7), unique=True), st.lists(st.text("ab ", max_size=20)))
def test_any_vocabulary_merges_in_the_same_order(tokens: list[str], texts: list[str]) -> None:
    tokens_in_order = [*SINGLE_BYTES, *(token.encode() for token in tokens)]
    tokenizer = from_ranks(Path("any"), {token: rank for rank, token in enumerate(tokens_in_order)})
    built = build_tokenizer(tokenizer)
    for text in texts:
        assert built.encode(text).ids == tokenizer.encode(text).tolist()


def test_merged_from_gives_the_last_two_parts_of_a_token() -> None:
    ranks = {token: rank for rank, token in enumerate([*SINGLE_BYTES, b"bc", b"ab", b"abc", b"xyz"])}
    assert merged_from(b"abc", ranks) == (b"a", b"bc")
    assert merged_from(b"a", ranks) is None
    assert merged_from(b"xyz", ranks) is None


def test_a_large_published_vocabulary_keeps_its_pattern_and_end_of_text() -> None:
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens = (SINGLE_BYTES + pairs + [b"\0" + pair for pair in pairs])[:100_256]
    tokenizer = from_ranks(Path("large"), {token: rank for rank, token in enumerate(tokens)})
    built = build_tokenizer(tokenizer)
    for text in ("1234567", "a  \nb  \n ", "It'LL do, \r\n\r\n  x's", "naïve 東京", "a \n \n"):
        assert built.encode(text).ids == tokenizer.encode(text).tolist()
    assert built.token_to_id("<|endoftext|>") == tokenizer.eot == 100_257


def test_a_run_without_its_tokenizer_is_exported_without_one_or_with_a_given_one(tmp_path: Path) -> None:
    saved = checkpoint.load(checkpoint.find(write_checkpointed_run(tmp_path / "run", "byte")))
    for spec in ("none", "missing.tiktoken"):
        config = {**saved.state["config"], "data": {**saved.state["config"]["data"], "tokenizer": spec}}
        state = {key: value for key, value in saved.state.items() if key not in ("sha256", "config")}
        checkpoint.save(tmp_path / spec / "checkpoints", saved.model, {}, {**state, "config": config})
    folder = export(tmp_path / "none", tmp_path / "bare")
    assert not (folder / "tokenizer.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id is None
    with pytest.raises(UserError, match=r"missing\.tiktoken"):
        export(tmp_path / "missing.tiktoken", tmp_path / "not")
    hf.main(["export", f"checkpoint={tmp_path / 'missing.tiktoken'}", f"to={tmp_path / 'given'}", "tokenizer=byte"])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "given")("ab").input_ids == [97, 98]
