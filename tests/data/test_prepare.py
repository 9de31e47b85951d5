"""Preparation: text of every kind becomes shards, the same bytes however often it was killed."""

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodisp.data import documents as corpus
from nanodisp.data.prepare import DATA, DataConfig, prepare, prepare_documents
from nanodisp.data.shards import Manifest, open_split, read_shard, verify
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.errors import UserError

EOT = 256


def config(tmp_path, path=None, **changes):
    return DataConfig(**{"name": "text", "folder": str(tmp_path / "prepared"), "path": path and str(path), **changes})


def documents_of(folder, split):
    """The documents of a byte-tokenised split, as text."""
    tokens = open_split(folder, split).read(0, len(open_split(folder, split)))
    *documents, after = np.split(tokens, np.flatnonzero(tokens == EOT) + 1)
    assert not len(after)
    return [bytes(document[:-1].tolist()).decode() for document in documents]


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_ranks(path, merges=()):
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- what becomes of each kind of corpus -----------------------------------------------------


@pytest.mark.parametrize("text", ["0123456789" * 10, "é" * 50 + "x"])
def test_one_text_file_gives_its_end_to_validation(tmp_path, text):
    path = tmp_path / "book.txt"
    path.write_text(text)
    folder = prepare(config(tmp_path, path, val_fraction=0.1))
    (train,), (val,) = documents_of(folder, "train"), documents_of(folder, "val")
    assert train + val == text
    assert len(train.encode()) in range(int(len(text.encode()) * 0.9), int(len(text.encode()) * 0.9) + 2)


def test_a_folder_gives_every_kth_file_to_validation(tmp_path):
    root = tmp_path / "texts"
    (root / "inner").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("a.txt", "b.md", "c.py", "inner/d.rst", "inner/e"):
        (root / name).write_text(f"this is {name}\n")
    (root / ".hidden" / "f.txt").write_text("hidden")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    (root / "empty.txt").write_text("")
    folder = prepare(config(tmp_path, root, val_fraction=0.25))
    assert documents_of(folder, "val") == ["this is a.txt\n", "this is inner/e\n"]
    assert documents_of(folder, "train") == ["this is b.md\n", "this is c.py\n", "this is inner/d.rst\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_of_jsonl_is_a_document(tmp_path, name):
    content = b'{"body": "one"}\n\n{"body": "two\\n"}\n{"body": ""}\n{"body": "\\ud800four"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    folder = prepare(config(tmp_path, tmp_path / name, field="body", val_fraction=0.5))
    assert documents_of(folder, "val") == ["one"]
    assert documents_of(folder, "train") == ["two\n", "?four"]


def test_a_row_of_parquet_is_a_document(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"page": ["one", "two", None, "three"]}), tmp_path / "a.parquet")
    folder = prepare(config(tmp_path, tmp_path / "a.parquet", field="page", val_fraction=0.5))
    assert documents_of(folder, "val") == ["one", "three"]
    assert documents_of(folder, "train") == ["two"]


def test_bytes_that_are_no_utf8_are_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 20)
    folder = prepare(config(tmp_path, tmp_path / "a.txt"))
    assert documents_of(folder, "train")[0].startswith("caf� caf� ")


def test_bytes_per_token_counts_text_over_tokens(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "é" * 3}, {"text": "ab"}, {"text": "c"}, {"text": "def"}])
    folder = prepare(config(tmp_path, path, val_fraction=0.5))
    assert Manifest.load(folder).bytes_per_token == {"train": 5 / 7, "val": 7 / 9}


# --- long documents are cut where no token is --------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ab", "é", "x.", "'s", "_", "12345", "?!"]), st.text(" \n\t", max_size=4))))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(ranks, words):
    text = "".join(word + space + "ab" + space + " " for word, space in words)
    with mock.patch.object(corpus, "PIECE", 32):
        pieces = list(corpus.cut(text))
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece) <= 32 for piece, _ in pieces)
    tokens = np.concatenate([ranks.encode(piece) for piece, _ in pieces])
    assert tokens.tolist() == ranks.encode(text).tolist()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    merges = [b"ab", b" ab", b"  ", b"\n\n", b" \n", b"\n ", b".\n", b"\t\t", b"12", b" x", b"   "]
    return load_tokenizer(write_ranks(tmp_path_factory.mktemp("ranks") / "tiny.tiktoken", merges))


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60), start=st.integers(0, 3))
def test_a_file_read_in_pieces_is_the_file(tmp_path_factory, text, start):
    path = tmp_path_factory.mktemp("file") / "a.txt"
    path.write_bytes(b"x" * start + text.encode())
    with mock.patch.object(corpus, "PIECE", 8):
        pieces = list(corpus.read_text(path, start, path.stat().st_size))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True] * bool(text)


# --- the same corpus is the same folder ----------------------------------------------------------


def test_a_second_preparation_does_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words " * 20)
    first = prepare(config(tmp_path, tmp_path / "a.txt"))
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    capsys.readouterr()
    assert prepare(config(tmp_path, tmp_path / "a.txt")) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == times
    assert capsys.readouterr().err == ""


def test_the_same_content_elsewhere_is_the_same_folder(tmp_path):
    folders = []
    for place in ("here", "there"):
        (tmp_path / place / "texts").mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            (tmp_path / place / "texts" / name).write_text(name)
        folders.append(prepare(config(tmp_path, tmp_path / place / "texts")))
    assert folders[0] == folders[1]


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0.2}, {"field": "body"}, {"shard_tokens": 1000}, {"tokenizer": "RANKS"}]
)
def test_another_setting_is_another_folder(tmp_path, change):
    (tmp_path / "a.txt").write_text("some words " * 20)
    if "tokenizer" in change:
        change = {"tokenizer": str(write_ranks(tmp_path / "tiny.tiktoken"))}
    first = prepare(config(tmp_path, tmp_path / "a.txt"))
    assert prepare(config(tmp_path, tmp_path / "a.txt", **change)) != first


def test_changed_content_is_another_folder(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20)
    first = prepare(config(tmp_path, tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("other words" * 20)
    assert prepare(config(tmp_path, tmp_path / "a.txt")) != first


def test_a_tokenizer_file_lies_in_the_folder(tmp_path):
    (tmp_path / "a.txt").write_text("the words " * 20)
    path = write_ranks(tmp_path / "tiny.tiktoken", [b"the", b" the"])
    folder = prepare(config(tmp_path, tmp_path / "a.txt", tokenizer=str(path)))
    path.unlink()
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(manifest.tokenizer, folder)
    tokens = open_split(folder, "train")
    assert (tokenizer.vocab_size, manifest.vocab_size) == (259, 259)
    assert tokenizer.decode_bytes(tokens.read(0, len(tokens))) == ("the words " * 19).encode()


def test_of_several_at_once_one_prepares(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words " * 20)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(prepare, [config(tmp_path, tmp_path / "a.txt")] * 4))
    assert len(folders) == 1 and len(open_split(folders.pop(), "train")) > 0
    assert capsys.readouterr().err.count("preparing") == 1


# --- killed and run again -------------------------------------------------------------------------

DOCUMENTS = [f"document {number} " * (number % 7) for number in range(300)]


def small_shards(tmp_path):
    return config(tmp_path, shard_tokens=2000)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    return prepare_documents(small_shards(tmp_path_factory.mktemp("unkilled")), DOCUMENTS, "docs", "a test")


def test_shards_hold_whole_documents_in_order(unkilled):
    assert documents_of(unkilled, "val") == [text for text in DOCUMENTS[::20] if text]
    assert documents_of(unkilled, "train") == [text for i, text in enumerate(DOCUMENTS) if i % 20 and text]
    shards = verify(unkilled).shards
    assert len(shards) > 10 and all(shard.tokens <= 2000 for shard in shards)
    assert all(read_shard(unkilled / shard.file)[-1] == EOT for shard in shards)


def prepare_until(stop, tmp_path):
    """Prepare in vain: the stream of documents breaks. Gives the folder that is left behind."""

    def documents():
        yield from DOCUMENTS[:stop]
        raise KeyboardInterrupt

    # every document is a batch of its own, so that what comes before the stop reaches the shards
    with mock.patch("nanodisp.prepare.PIECE", 2), pytest.raises(KeyboardInterrupt):
        prepare_documents(small_shards(tmp_path), documents(), "docs", "a test")
    return next((tmp_path / "prepared").iterdir())


@pytest.mark.parametrize(("stop", "n_left"), [(0, 0), (37, 0), (150, 2), (300, 5)])
def test_a_preparation_that_stopped_goes_on(tmp_path, unkilled, stop, n_left):
    assert len(list(prepare_until(stop, tmp_path).glob("train_*.bin"))) >= n_left
    assert files_of(prepare_documents(small_shards(tmp_path), DOCUMENTS, "docs", "a test")) == files_of(unkilled)


KILLED = """
import os, signal, sys
from nanodisp.data import prepare
prepare.PIECE = 2
def documents():
    for number in range(300):
        if number == 250:
            os.kill(os.getpid(), signal.SIGKILL)
        yield f"document {number} " * (number % 7)
config = prepare.DataConfig(name="text", folder=sys.argv[1], shard_tokens=2000)
prepare.prepare_documents(config, documents(), "docs", "a test")
"""


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, unkilled):
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "prepared")], cwd=DATA.parent, timeout=120)
    assert child.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "prepared").iterdir()
    with pytest.raises(UserError, match="unfinished preparation"):
        open_split(folder, "train")
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("train_*.bin")}
    assert finished
    (folder / ".train_000099.bin.tmp").write_bytes(b"half")
    prepare_documents(small_shards(tmp_path), DOCUMENTS, "docs", "a test")
    assert files_of(folder) == files_of(unkilled)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["gone", "cut"])
@pytest.mark.parametrize("name", ["train_000001.bin", "progress.json"])
def test_what_a_stopped_preparation_lost_is_made_again(tmp_path, unkilled, name, damage):
    damage(prepare_until(300, tmp_path) / name)
    assert files_of(prepare_documents(small_shards(tmp_path), DOCUMENTS, "docs", "a test")) == files_of(unkilled)


def test_a_long_file_is_the_same_in_one_shard_or_many(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {number} of a long file\n" for number in range(30_000)))
    one = prepare(config(tmp_path, tmp_path / "a.txt"))
    many = prepare(config(tmp_path, tmp_path / "a.txt", shard_tokens=300_000))
    assert len(open_split(many, "train").paths) > 1
    for split in ("train", "val"):
        assert documents_of(one, split) == documents_of(many, split)


# --- mistakes ---------------------------------------------------------------------------------


def refused(config, said):
    with pytest.raises(UserError, match=said) as error:
        prepare(config)
    assert "\n" not in str(error.value)


def test_a_missing_path_is_told(tmp_path):
    refused(config(tmp_path, tmp_path / "none"), r"none does not exist; give a file of text")
    refused(config(tmp_path, None), "needs data.path")


def test_a_binary_file_is_told(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    refused(config(tmp_path, tmp_path / "a.bin"), "is not text")


def test_a_folder_without_text_is_told(tmp_path):
    (tmp_path / "texts").mkdir()
    refused(config(tmp_path, tmp_path / "texts"), "holds no text, jsonl or parquet file among its 0 files")


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20)
    (tmp_path / "prepared").write_text("a file")
    refused(config(tmp_path, tmp_path / "a.txt"), "cannot be written .*set data.folder")


@pytest.mark.parametrize("text", ["", "x"])
def test_a_corpus_with_too_little_text_is_told(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    refused(config(tmp_path, tmp_path / "a.txt"), "too little text: none is left for train")


def test_a_single_document_cannot_be_split(tmp_path):
    alone = write_jsonl(tmp_path / "a.jsonl", [{"text": "alone"}])
    refused(config(tmp_path, alone), "none is left for train; add documents")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"body": "x"}', r"line 2 has no text under 'text' \(its keys are body\); set data.field"),
        ('{"text": 5}', "line 2 has no text under 'text'"),
        ("[1]", "it is not an object"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_told(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    refused(config(tmp_path, tmp_path / "a.jsonl"), said)


def test_a_truncated_gzip_is_told(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 100)[:-12])
    refused(config(tmp_path, tmp_path / "a.jsonl.gz"), "cannot be read")


def test_a_missing_column_of_parquet_is_told(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"page": ["one"], "text": [1]}), tmp_path / "a.parquet")
    refused(config(tmp_path, tmp_path / "a.parquet"), r"no text column 'text' \(it has page\)")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
    refused(config(tmp_path, tmp_path / "b.parquet"), "cannot be read as parquet")


def test_a_missing_tokenizer_file_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    refused(config(tmp_path, tmp_path / "a.txt", tokenizer="none.tiktoken"), r"none\.tiktoken cannot be read")


def test_an_unknown_dataset_is_told_with_the_known_ones(tmp_path):
    refused(config(tmp_path, name="pile"), "data.name=pile is unknown; choose one of fineweb10B, .*text, wikitext103")


def test_shards_are_taken_as_they_lie(tmp_path):
    assert prepare(DataConfig(name="shards", path=str(tmp_path))) == tmp_path
    refused(DataConfig(name="shards"), "needs the folder of the shards")
    refused(DataConfig(name="shards", path=str(tmp_path / "none")), "needs the folder of the shards")


@pytest.mark.parametrize(
    "values", [{"val_fraction": 0.0}, {"val_fraction": 0.6}, {"shard_tokens": 0}, {"chunks": 0}, {"tokenizer": ""}]
)
def test_an_impossible_value_is_told_with_its_key(values):
    with pytest.raises(ValueError, match=f"^data.{next(iter(values))}"):
        DataConfig(**values)


# --- the command line ----------------------------------------------------------------------------


def run_script(*arguments):
    command = [sys.executable, str(DATA / "text" / "prepare.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(DATA.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_the_script_prints_the_folder_and_what_it_holds(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    done = run_script(f"path={tmp_path / 'a.txt'}", f"folder={tmp_path / 'prepared'}", "val_fraction=0.2")
    folder, *counts = done.stdout.splitlines()
    assert Path(folder) == prepare(config(tmp_path, tmp_path / "a.txt", val_fraction=0.2))
    assert counts == ["train: 801 tokens, shards: 1", "val: 201 tokens, shards: 1"]


def test_the_script_tells_a_mistake_in_one_line(tmp_path):
    done = run_script("path=x", "colour=blue")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "colour=blue" in done.stderr and "val_fraction" in done.stderr
