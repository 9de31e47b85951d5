"""Tokenizers: decoding inverts encoding, and a damaged file is reported in one line."""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.data import tokenizer as tokenizer_module
from nanodisp.data.prepare import DataConfig, prepare_files
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


# --- training ----------------------------------------------------------------------------------

WORDS = ("def", "return", "self", "values", "key", "naïve", "café", "item", "iterate", "index", "print", "none", "not")
CHOSEN = np.random.default_rng(0).choice(WORDS, (99, 4))
TEXT = "".join(f"{a} {b}({c}):\n    {d}.{a}  # {b}, {c}\n" for a, b, c, d in CHOSEN)


@pytest.fixture
def train(tmp_path):
    """`python -m nanodisp.data.tokenizer train`; returns the file. `text` is a path, or the text of a file."""
    pytest.importorskip("tokenizers")

    def go(text=TEXT, vocab_size=300, to="own.tiktoken", *others):
        path = text if isinstance(text, Path) else tmp_path / "text.txt"
        if not isinstance(text, Path):
            path.write_text(text, encoding="utf-8")
        given = [f"text={path}", f"vocab_size={vocab_size}", f"to={tmp_path / to}", *others]
        tokenizer_module.main(["train", *given])
        return tmp_path / to

    return go


def tokens_in(path):
    return [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]


def test_a_trained_vocabulary_has_the_bytes_and_then_merges_and_its_size_counts_end_of_text(train, capsys):
    path = train(vocab_size=300)
    tokens, own = tokens_in(path), load_tokenizer(path)
    assert (own.vocab_size, own.eot, len(tokens)) == (300, 299, 299)
    assert tokens[:256] == SINGLE_BYTES
    assert all(any(a + b == token for a in tokens[:i] for b in tokens[:i]) for i, token in enumerate(tokens) if i > 255)
    assert "wrote" in (printed := capsys.readouterr().out) and f"{path}: 256 bytes, 43 merges" in printed
    assert len(own.encode(TEXT)) < len(TEXT) / 2


@pytest.fixture(scope="module")
def own_and_theirs(tmp_path_factory):
    """A trained vocabulary, and Hugging Face's tokenizer of the same training."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer_module.main(["train", f"text={folder / 'text.txt'}", "vocab_size=315", f"to={folder / 'own.tiktoken'}"])
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], vocab_size=314, min_frequency=2, show_progress=False)
    return load_tokenizer(folder / "own.tiktoken"), theirs


@given(text=st.text() | st.lists(st.sampled_from([*WORDS, *"avlues.#ïé \n"]), max_size=50).map("".join))
def test_a_trained_vocabulary_decodes_what_it_encodes_as_hugging_face_does(own_and_theirs, text):
    own, theirs = own_and_theirs
    tokens = own.encode(text)
    assert own.decode_bytes(tokens).decode() == text
    letters = tokenizer_module.letters()
    spelled = ["".join(letters[byte] for byte in own.decode_bytes([token])) for token in tokens]
    assert spelled == theirs.encode(text).tokens


def test_training_again_gives_the_same_file(train):
    assert train(to="a.tiktoken").read_bytes() == train(to="b.tiktoken").read_bytes()


def test_a_folder_is_read_without_its_files_for_validation_and_testing(train, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT, encoding="utf-8")
    for name in ("val.txt", "test.jsonl"):
        (folder / name).write_text('{"text": "' + "xyzzy " * 500 + '"}')
    assert train(folder, to="folder.tiktoken").read_bytes() == train(TEXT, to="file.tiktoken").read_bytes()


@pytest.mark.parametrize("spec", ["byte", "tiny"])
def test_prepared_shards_give_the_documents_of_their_training_split(tmp_path, ranks_file, spec, monkeypatch):
    texts = [f"{i}é" * 60 for i in range(1, 8)]  # the first of seven is for validation
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"tokenizer": str(ranks_file) if spec == "tiny" else spec, "val_fraction": 1 / 7}
    prepare_files(DataConfig(**settings, folder=str(tmp_path)), [tmp_path / "all.jsonl"], tmp_path, "shards")
    (shards,) = tmp_path.glob("shards-*")
    monkeypatch.setattr(tokenizer_module, "PIECE", 50)  # the two bytes of é fall into two pieces
    config = tokenizer_module.TrainConfig(text=str(shards), vocab_size=300, to="own.tiktoken")
    assert list(tokenizer_module.training_texts(config)) == texts[1:]


def test_documents_do_not_merge_into_each_other(train, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "qx"}\n' * 50 + '{"text": "abab"}\n{"text": "\\ud800"}\n', encoding="utf-8")
    assert tokens_in(train(lines, 258))[-1] == b"qx"
    with pytest.raises(UserError, match="at most 259"):  # qx and ab: never xq
        train(lines, 260, "more.tiktoken")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 257}, "vocab_size=257 must be 258 .* to 1,000,000"),
        ({"vocab_size": 10**9}, "vocab_size=1000000000 must be 258"),
        ({"vocab_size": 100_257}, "published encoding"),
        ({"vocab_size": 5000}, r"vocab_size=5000 needs more text: .* for at most \d+ tokens"),
        ({"to": "own.txt"}, r"own\.txt must be a file named \*\.tiktoken"),
        ({"to": "text.tiktoken"}, r"text\.tiktoken exists: give another name"),
        ({"to": "nowhere/own.tiktoken"}, "nowhere; create it first"),
        ({"text": Path("nowhere.txt")}, r"^text=nowhere\.txt does not exist"),
        ({"text": ""}, "needs more text"),
    ],
    ids=str,
)
def test_a_mistake_in_training_is_reported_in_one_line(train, tmp_path, arguments, message):
    (tmp_path / "text.tiktoken").write_text("")
    with pytest.raises(UserError, match=message) as error:
        train(*{"text": TEXT, "vocab_size": 300, "to": "own.tiktoken", **arguments}.values())
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.glob("*.tiktoken")) == ["text.tiktoken"]


def test_the_keys_of_errors_about_text_are_those_of_the_command(train, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"has no 'text' \(its keys are body\); set field$"):
        train(lines)
    with pytest.raises(UserError, match="encoding=klingon is unknown"):
        train(TEXT, 300, "own.tiktoken", "encoding=klingon")
    with pytest.raises(UserError, match="give train: python -m nanodisp"):
        tokenizer_module.main(["tarin"])


def test_training_needs_tokenizers_and_says_so(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs tokenizers: pip install 'nanodisp\[data\]'"):
        train()
