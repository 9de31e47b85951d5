"""Preparation: text in every format becomes shards, with the same bytes after any number of interruptions."""

import base64
import gzip
import json
import os
import runpy
import shutil
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

from nanodisp.data import documents
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


# --- every kind of corpus ---------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0123456789" * 10, "é" * 50 + "x"])
def test_the_end_of_a_single_text_file_is_validation(tmp_path, text):
    path = tmp_path / "book.txt"
    path.write_text(text)
    folder = prepare(config(tmp_path, path, val_fraction=0.1))
    (train,), (val,) = documents_of(folder, "train"), documents_of(folder, "val")
    assert train + val == text
    assert len(train.encode()) in range(int(len(text.encode()) * 0.9), int(len(text.encode()) * 0.9) + 2)


def test_a_text_file_is_a_document_and_hidden_files_are_none(tmp_path):
    root = tmp_path / "texts"
    (root / "inner").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("a.txt", "b.md", "c.py", "inner/d.rst", "inner/e"):
        (root / name).write_text(f"this is {name}\n".ljust(30, "."))
    (root / ".hidden" / "f.txt").write_text("hidden")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    (root / "empty.txt").write_text("")
    folder = prepare(config(tmp_path, root, val_fraction=0.5))
    val, train = documents_of(folder, "val"), documents_of(folder, "train")
    assert [text.rstrip(".")[8:-1] for text in val] == ["a.txt", "c.py", "inner/e"]
    assert [text.rstrip(".")[8:-1] for text in train] == ["b.md", "inner/d.rst"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_of_jsonl_is_a_document(tmp_path, name):
    content = b'{"body": "one"}\n\n{"body": "two\\n"}\n{"body": ""}\n{"body": "\\ud8004"}\n{"body": "five"}'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    folder = prepare(config(tmp_path, tmp_path / name, field="body", val_fraction=0.5))
    assert documents_of(folder, "val") == ["one", "five"]
    assert documents_of(folder, "train") == ["two\n", "?4"]


def test_a_row_of_parquet_is_a_document(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"page": ["one", "four", None, "two"]}), tmp_path / "a.parquet")
    folder = prepare(config(tmp_path, tmp_path / "a.parquet", field="page", val_fraction=0.5))
    assert documents_of(folder, "val") == ["one", "two"]
    assert documents_of(folder, "train") == ["four"]


def test_bytes_per_token_is_the_size_of_the_text_over_its_tokens(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "é" * 3}, {"text": "ab"}, {"text": "c"}, {"text": "def"}])
    folder = prepare(config(tmp_path, path, val_fraction=0.5))
    assert Manifest.load(folder).bytes_per_token == {"train": 5 / 7, "val": 7 / 9}


# --- long documents are cut between tokens -----------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ab", "é", "x.", "'s", "_", "12345", "?!"]), st.text(" \n\t", max_size=4))))
def test_the_pieces_have_the_tokens_of_the_document(ranks, words):
    text = "".join(word + space + "ab" + space + " " for word, space in words)
    with mock.patch.object(documents, "PIECE", 32):
        pieces = list(documents.cut(text))
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece) <= 32 for piece, _ in pieces)
    tokens = np.concatenate([ranks.encode(piece) for piece, _ in pieces])
    assert tokens.tolist() == ranks.encode(text).tolist()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    merges = [b"ab", b" ab", b"  ", b"\n\n", b" \n", b"\n ", b".\n", b"\t\t", b"12", b" x", b"   "]
    return load_tokenizer(write_ranks(tmp_path_factory.mktemp("ranks") / "tiny.tiktoken", merges))


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20)))
def test_the_pieces_of_chunks_join_to_their_text(chunks):
    with mock.patch.object(documents, "PIECE", 8):
        pieces = list(documents.join_and_cut(chunks))
    assert "".join(piece for piece, _ in pieces) == "".join(chunks)
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


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
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "some words " * 20, "body": "other words " * 20}])
    if "tokenizer" in change:
        change = {"tokenizer": str(write_ranks(tmp_path / "tiny.tiktoken"))}
    first = prepare(config(tmp_path, path))
    assert prepare(config(tmp_path, path, **change)) != first


def test_a_field_has_no_effect_on_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20)
    assert_rejected(
        config(tmp_path, tmp_path / "a.txt", field="body"),
        r"^data\.field=body has no effect: no file is jsonl or parquet; leave it out$",
    )
    write_jsonl(tmp_path / "b.jsonl", [{"body": "other words " * 20}])
    prepare(config(tmp_path, tmp_path, field="body"))


def test_an_encoding_has_no_effect_on_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert_rejected(
        config(tmp_path, tmp_path / "a.parquet", encoding="cp1252"),
        r"^data\.encoding=cp1252 has no effect: all files are parquet; leave it out$",
    )


def test_changed_content_is_another_folder(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20)
    first = prepare(config(tmp_path, tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("other words" * 20)
    assert prepare(config(tmp_path, tmp_path / "a.txt")) != first


def test_the_tokenizer_file_is_copied_into_the_folder(tmp_path):
    (tmp_path / "a.txt").write_text("the words " * 20)
    path = write_ranks(tmp_path / "tiny.tiktoken", [b"the", b" the"])
    folder = prepare(config(tmp_path, tmp_path / "a.txt", tokenizer=str(path)))
    path.unlink()
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(manifest.tokenizer, folder)
    tokens = open_split(folder, "train")
    assert (tokenizer.vocab_size, manifest.vocab_size) == (259, 259)
    assert tokenizer.decode_bytes(tokens.read(0, len(tokens))) == ("the words " * 19).encode()


def test_of_several_processes_one_prepares(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words " * 20)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(prepare, [config(tmp_path, tmp_path / "a.txt")] * 4))
    assert len(folders) == 1 and len(open_split(folders.pop(), "train")) > 0
    assert capsys.readouterr().err.count("preparing") == 1


# --- interrupted and resumed ---------------------------------------------------------------------

DOCUMENTS = [f"document {number} " * (number % 7) for number in range(300)]


def small_shards(tmp_path):
    return config(tmp_path, shard_tokens=2000)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return prepare_documents(small_shards(tmp_path_factory.mktemp("uninterrupted")), DOCUMENTS, "docs", "a test")


def test_shards_hold_complete_documents_in_order(uninterrupted):
    assert documents_of(uninterrupted, "val") == [text for text in DOCUMENTS[::20] if text]
    assert documents_of(uninterrupted, "train") == [text for i, text in enumerate(DOCUMENTS) if i % 20 and text]
    shards = verify(uninterrupted).shards
    assert len(shards) > 10 and all(shard.tokens <= 2000 for shard in shards)
    assert all(read_shard(uninterrupted / shard.file)[-1] == EOT for shard in shards)


def prepare_until(stop, tmp_path):
    """An interrupted preparation: the stream of documents fails. Returns the folder it leaves."""

    def interrupted():
        yield from DOCUMENTS[:stop]
        raise KeyboardInterrupt

    # each document is a batch of its own, so that those before the stop reach the shards
    with mock.patch("nanodisp.data.writer.PIECE", 2), pytest.raises(KeyboardInterrupt):
        prepare_documents(small_shards(tmp_path), interrupted(), "docs", "a test")
    return next((tmp_path / "prepared").iterdir())


@pytest.mark.parametrize(("stop", "n_left"), [(0, 0), (37, 0), (150, 2), (300, 5)])
def test_an_interrupted_preparation_is_resumed(tmp_path, uninterrupted, stop, n_left):
    assert len(list(prepare_until(stop, tmp_path).glob("train_*.bin"))) >= n_left
    assert files_of(prepare_documents(small_shards(tmp_path), DOCUMENTS, "docs", "a test")) == files_of(uninterrupted)


KILLED = """
import os, signal, sys
from nanodisp.data import prepare, writer
writer.PIECE = 2
def documents():
    for number in range(300):
        if number == 250:
            os.kill(os.getpid(), signal.SIGKILL)
        yield f"document {number} " * (number % 7)
config = prepare.DataConfig(name="text", folder=sys.argv[1], shard_tokens=2000)
prepare.prepare_documents(config, documents(), "docs", "a test")
"""


@pytest.mark.slow
def test_a_killed_preparation_resumes_where_it_stopped(tmp_path, uninterrupted):
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "prepared")], cwd=DATA.parent, timeout=120)
    assert child.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "prepared").iterdir()
    with pytest.raises(UserError, match="unfinished preparation"):
        open_split(folder, "train")
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("train_*.bin")}
    assert finished
    (folder / ".train_000099.bin.tmp").write_bytes(b"half")
    prepare_documents(small_shards(tmp_path), DOCUMENTS, "docs", "a test")
    assert files_of(folder) == files_of(uninterrupted)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["gone", "cut"])
@pytest.mark.parametrize("name", ["train_000001.bin", "progress.json"])
def test_files_lost_after_an_interruption_are_written_again(tmp_path, uninterrupted, name, damage):
    damage(prepare_until(300, tmp_path) / name)
    assert files_of(prepare_documents(small_shards(tmp_path), DOCUMENTS, "docs", "a test")) == files_of(uninterrupted)


def test_a_long_file_is_the_same_in_one_shard_or_many(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {number} of a long file\n" for number in range(30_000)))
    one = prepare(config(tmp_path, tmp_path / "a.txt"))
    many = prepare(config(tmp_path, tmp_path / "a.txt", shard_tokens=300_000))
    assert len(open_split(many, "train").paths) > 1
    for split in ("train", "val"):
        assert documents_of(one, split) == documents_of(many, split)


# --- mistakes ---------------------------------------------------------------------------------


def assert_rejected(config, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(config)
    assert "\n" not in str(error.value)


def test_a_missing_path_is_reported(tmp_path):
    assert_rejected(config(tmp_path, tmp_path / "none"), r"none does not exist; give a file of text")
    assert_rejected(config(tmp_path, None), "needs data.path")
    with pytest.raises(ValueError, match=r"^data\.path is empty; give data=text data\.path="):
        config(tmp_path, "")


def test_a_binary_file_is_reported(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    assert_rejected(config(tmp_path, tmp_path / "a.bin"), "is not text")


def test_a_folder_without_text_is_reported(tmp_path):
    (tmp_path / "texts").mkdir()
    assert_rejected(config(tmp_path, tmp_path / "texts"), "holds no file of text, jsonl or parquet$")


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20)
    (tmp_path / "prepared").write_text("a file")
    assert_rejected(config(tmp_path, tmp_path / "a.txt"), "cannot be written .*set data.folder")


@pytest.mark.parametrize("text", ["", "x"])
def test_a_corpus_with_too_little_text_is_reported(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert_rejected(config(tmp_path, tmp_path / "a.txt"), "too little text: train would be empty")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"line 2 has no 'text' \(its keys are body\); set data.field"),
        ('{"text": 5}', "line 2 has no text under 'text' but a value of type int"),
        ("[1]", "line 2 is not an object"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_an_invalid_line_of_jsonl_is_reported(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert_rejected(config(tmp_path, tmp_path / "a.jsonl"), message)


def test_a_truncated_gzip_is_reported(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 100)[:-12])
    assert_rejected(config(tmp_path, tmp_path / "a.jsonl.gz"), "cannot be read")


def test_a_missing_column_of_parquet_is_reported(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"page": ["one"], "text": [1]}), tmp_path / "a.parquet")
    assert_rejected(config(tmp_path, tmp_path / "a.parquet"), r"no text column 'text' \(it has page\)")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
    assert_rejected(config(tmp_path, tmp_path / "b.parquet"), "cannot be read as parquet")


def test_a_missing_tokenizer_file_is_reported(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    assert_rejected(config(tmp_path, tmp_path / "a.txt", tokenizer="none.tiktoken"), r"none\.tiktoken cannot be read")


def test_an_unknown_data_set_is_reported_with_the_known_ones(tmp_path):
    assert_rejected(
        config(tmp_path, name="pile"), "data.name=pile is unknown; choose one of .*fineweb10B, .*text, .*shards"
    )


@pytest.mark.parametrize("name", ["pystdlib", "text"])
def test_an_installed_package_reports_that_data_sets_need_a_clone(tmp_path, monkeypatch, name):
    monkeypatch.setattr("nanodisp.data.prepare.DATA", tmp_path / "none" / "data")
    monkeypatch.setattr("nanodisp.data.prepare.CONF", tmp_path / "none" / "conf" / "data")
    (tmp_path / "a.txt").write_text("some words " * 20)
    assert_rejected(
        config(tmp_path, tmp_path / "a.txt", name=name),
        rf"data\.name={name} needs data/ and conf/ of a clone .*data=shards data\.path=<folder>.*text=<file>",
    )
    assert prepare(DataConfig(name="shards", path=str(tmp_path))) == tmp_path


def test_a_folder_of_shards_is_used_directly(tmp_path):
    assert prepare(DataConfig(name="shards", path=str(tmp_path))) == tmp_path
    assert_rejected(DataConfig(name="shards"), "needs a folder of shards")
    assert_rejected(DataConfig(name="shards", path=str(tmp_path / "none")), "needs a folder of shards")


@pytest.mark.parametrize(
    "values", [{"val_fraction": 0.0}, {"val_fraction": 0.6}, {"shard_tokens": 0}, {"chunks": 0}, {"tokenizer": ""}]
)
def test_an_invalid_value_is_reported_with_its_key(values):
    with pytest.raises(ValueError, match=f"^data.{next(iter(values))}"):
        DataConfig(**values)


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_prints_the_folder_and_its_contents(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    arguments = (f"path={tmp_path / 'a.txt'}", f"folder={tmp_path / 'prepared'}", "val_fraction=0.2")
    command = [sys.executable, str(DATA / "text" / "prepare.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(DATA.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    folder, *counts = done.stdout.splitlines()
    assert Path(folder) == prepare(config(tmp_path, tmp_path / "a.txt", val_fraction=0.2))
    assert counts == ["train: 801 tokens, shards: 1", "val: 201 tokens, shards: 1"]


@pytest.mark.parametrize(("given", "n_val"), [([], 300), (["val_fraction=0.4"], 400)], ids=["defaults", "given"])
def test_the_script_takes_its_defaults_from_its_own_clone(tmp_path, monkeypatch, capsys, given, n_val):
    """Even if another nanodisp is imported, such as an installed one."""
    clone = tmp_path / "clone"
    (clone / "conf" / "data").mkdir(parents=True)
    (clone / "conf" / "data" / "text.yaml").write_text("name: text\npath: ???\nval_fraction: 0.3\n")
    shutil.copytree(DATA / "text", clone / "data" / "text", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "a.txt").write_text("x" * 1000)
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"path={tmp_path / 'a.txt'}", *given])
    runpy.run_path(str(clone / "data" / "text" / "prepare.py"), run_name="__main__")
    folder, *counts = capsys.readouterr().out.splitlines()
    assert Path(folder).parent == clone / "data" / "text"
    assert counts == [f"train: {1001 - n_val} tokens, shards: 1", f"val: {n_val + 1} tokens, shards: 1"]


def test_the_script_reports_a_mistake_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "path=x", "colour=blue"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(DATA / "text" / "prepare.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.count("\n") == 1 and "colour=blue" in err and "val_fraction" in err


@pytest.mark.parametrize(("name", "key"), [("shakespeare", "path=x"), ("text", "chunks=7"), ("openwebtext", "path=x")])
def test_the_script_reports_a_key_without_effect(monkeypatch, capsys, name, key):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *(["path=x"] if name == "text" else []), key])
    with pytest.raises(SystemExit):
        runpy.run_path(str(DATA / name / "prepare.py"), run_name="__main__")
    assert f"{key} has no effect on data={name}: " in capsys.readouterr().err
