"""Tokenizers: decoding inverts encoding, and a damaged file is reported in one line."""

import base64
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.errors import UserError

MERGES = [b"th", b"the", b" the", b"  ", b"\n\n", b"a b", b"\xc3\xa9"]


def lines_of(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines_of(tokens)) + b"\n")
    return path


SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory):
    return write_ranks(tmp_path_factory.mktemp("ranks") / "tiny.tiktoken", SINGLE_BYTES + MERGES)


@pytest.fixture(scope="module", params=["byte", "tiny"])
def tokenizer(request, ranks_file):
    return load_tokenizer("byte" if request.param == "byte" else ranks_file)


@given(text=st.text())
def test_decoding_inverts_encoding(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    assert tokenizer.decode_bytes(tokens).decode() == text


def test_a_lone_surrogate_becomes_a_question_mark(tokenizer):
    assert tokenizer.decode_bytes(tokenizer.encode("a\ud800b")) == b"a?b"


def test_the_name_of_end_of_text_is_ordinary_text(tokenizer):
    tokens = tokenizer.encode("<|endoftext|>")
    assert tokenizer.eot not in tokens
    assert tokenizer.decode_bytes(tokens) == b"<|endoftext|>"


def test_end_of_text_decodes_to_nothing(tokenizer):
    assert tokenizer.decode_bytes([*tokenizer.encode("ab").tolist(), tokenizer.eot]) == b"ab"


def test_byte_tokens_are_the_bytes():
    byte = load_tokenizer("byte")
    assert (byte.name, byte.vocab_size, byte.eot) == ("byte", 257, 256)
    assert byte.encode("aé").tolist() == [97, 0xC3, 0xA9]


def test_end_of_text_follows_the_ranks_of_a_file(ranks_file):
    tiny = load_tokenizer(str(ranks_file))
    assert (tiny.name, tiny.eot, tiny.vocab_size) == ("tiny", 256 + len(MERGES), 257 + len(MERGES))


def test_a_file_merges_by_rank_and_never_across_words(ranks_file):
    tiny = load_tokenizer(ranks_file)
    rank = {token: 256 + index for index, token in enumerate(MERGES)}
    assert tiny.encode("the the").tolist() == [rank[b"the"], rank[b" the"]]
    assert tiny.encode("a b").tolist() == list(b"a b")


def test_a_published_vocabulary_is_recognised_by_its_number_of_ranks(tmp_path):
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens = (SINGLE_BYTES + pairs + [b"\0" + pair for pair in pairs])[:100_256]
    large = load_tokenizer(write_ranks(tmp_path / "large.tiktoken", tokens))
    assert (large.eot, large.vocab_size) == (100_257, 100_258)
    assert large.encode("ab").dtype == np.uint32
    # the pattern of this vocabulary splits digits into groups of three
    assert large.decode_bytes(large.encode("1234")) == b"1234" and large.encode("1234")[-1] == ord("4")


def test_a_relative_path_is_relative_to_the_folder(ranks_file):
    assert load_tokenizer("tiny.tiktoken", ranks_file.parent).name == "tiny"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "256 single bytes"),
        ([*lines_of(SINGLE_BYTES), b"!!! 256"], "line 257 is not a token in base64"),
        ([*lines_of(SINGLE_BYTES), b"dGhl"], "line 257 is not a token in base64"),
        ([*lines_of(SINGLE_BYTES), b"dGhl x"], "line 257 is not a token in base64"),
        ([*lines_of(SINGLE_BYTES), b"dGhl 255"], "must be 0 to 256"),
        ([*lines_of(SINGLE_BYTES), b"dGhl 300"], "must be 0 to 256"),
        ([*lines_of(SINGLE_BYTES), b"YQ== 256"], "must be 0 to 255"),
        (lines_of([*SINGLE_BYTES[1:], b"the"]), "256 single bytes"),
        (lines_of([*SINGLE_BYTES, b""]), "line 257 is not a token in base64"),
    ],
    ids=[
        "empty",
        "not base64",
        "no rank",
        "rank not a number",
        "rank twice",
        "gap",
        "token twice",
        "no zero",
        "no token",
    ],
)
def test_a_damaged_file_is_reported(tmp_path, lines, message):
    path = tmp_path / "broken.tiktoken"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"none\.tiktoken cannot be read"):
        load_tokenizer(tmp_path / "none.tiktoken")


def test_an_unknown_spec_is_reported_with_the_known_ones():
    with pytest.raises(UserError, match=r"tokenizer=bert is unknown; choose byte, gpt2, or .*\.tiktoken"):
        load_tokenizer("bert")


def test_gpt2_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # drop what another test may have loaded
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # no server
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*\.tiktoken file"):
        load_tokenizer("gpt2")
