"""Reading files: gzip, byte order marks, encodings; what is skipped, and that it is said."""

import codecs
import gzip
import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prepare import assert_rejected, config, documents_of, write_jsonl

from nanodisp.config import Config, identity
from nanodisp.data import decode
from nanodisp.data.documents import find_files
from nanodisp.data.prepare import DataConfig, prepare

TEXT = "Zażółć gęślą jaźń. " * 20


def text_of(folder):
    return "".join(documents_of(folder, "train") + documents_of(folder, "val"))


@pytest.mark.parametrize("mark", decode.BOMS, ids=decode.BOMS.get)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT.GZ"])
def test_a_byte_order_mark_decides_the_encoding_and_is_no_text(tmp_path, mark, name):
    raw = mark + TEXT.encode(decode.BOMS[mark])
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
    assert text_of(prepare(config(tmp_path, tmp_path / name, val_fraction=0.1))) == TEXT


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.JSONL"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_jsonl_may_begin_with_a_byte_order_mark(tmp_path, name, encoding):
    raw = "".join(json.dumps({"text": f"é{i}\u2028"}, ensure_ascii=False) + "\r\n" for i in range(4)).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    folder = prepare(config(tmp_path, tmp_path / name, val_fraction=0.25))
    assert sorted(documents_of(folder, "train") + documents_of(folder, "val")) == [f"é{i}\u2028" for i in range(4)]


def test_a_file_with_a_mark_is_another_folder_than_0_1_0_made(tmp_path):
    """Which left the mark in the text."""
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"some words " * 20)
    assert prepare(config(tmp_path, tmp_path / "a.txt")).name != "a-byte-c8e76b88"


def test_gzip_is_read_by_its_name_in_a_folder(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for name in ("a.txt.gz", "b.md.gz"):
        (root / name).write_bytes(gzip.compress(b"x" * 10))
    (root / "c.py").write_text("x" * 10)
    folder = prepare(config(tmp_path, root, val_fraction=0.3))
    assert len(text_of(folder)) == 30


# --- other encodings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding", "suggested"),
    [
        ("Käse, Brötchen und Äpfel für die Größten. ", "cp1252", "give data.encoding=cp1252, or another"),
        ("größe für käse ", "cp1252", "give data.encoding=cp1252, or another"),
        ("Все счастливые семьи похожи друг на друга. ", "cp1251", "cp1251"),  # noqa: RUF001
        ("吾輩は猫である。名前はまだ無い。", "shift_jis", "data.encoding=shift_jis"),
        ("我是猫。名字还没有。", "gb18030", "gb18030"),
    ],
)
def test_another_encoding_is_reported_with_its_place_and_its_name(tmp_path, text, encoding, suggested):
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain " + (text * 20).encode(encoding))
    first = 6 + next(i for i, byte in enumerate(text.encode(encoding)) if byte >= 0x80)
    assert_rejected(config(tmp_path, path), rf"a\.txt byte {first} is not utf-8 \(.*; .*{suggested}")
    assert not (tmp_path / "prepared").exists()
    assert text_of(prepare(config(tmp_path, path, encoding=encoding))) == "plain " + text * 20


def test_many_files_with_a_few_bytes_each_are_reported(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(5):
        (root / f"{i}.txt").write_bytes(b"one caf\xe9 " + b"x" * 50)
    assert_rejected(config(tmp_path, root), r"0\.txt byte 7 is not utf-8 .*data\.encoding=cp1252")


def test_a_few_undecodable_bytes_are_replaced_and_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and words " * 3 + b"x" * 100)
    folder = prepare(config(tmp_path, tmp_path / "a.txt"))
    assert text_of(folder).startswith("caf\ufffd and words caf\ufffd ")
    assert "; undecodable bytes replaced: 3, the first in " in capsys.readouterr().err
    assert "a.txt byte 3\n" in prepare_again(tmp_path, capsys)


def prepare_again(tmp_path, capsys):
    prepare(config(tmp_path, tmp_path / "a.txt", folder=str(tmp_path / "again")))
    return capsys.readouterr().err


def test_utf8_is_not_read_as_another_encoding(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    (root / "a.txt").write_bytes("für ".encode("cp1252") * 50)
    (root / "b.txt").write_bytes("für ".encode() * 50)
    assert_rejected(
        config(tmp_path, root, encoding="cp1252"), r"b\.txt is UTF-8, but data\.encoding=cp1252; .*iconv -f"
    )


def test_utf16_without_a_mark_is_read_if_it_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode("utf-16-le"))
    assert_rejected(
        config(tmp_path, tmp_path / "a.txt"), r"is not text \(binary, or UTF-16 .* data\.encoding=utf-16-le"
    )
    assert text_of(prepare(config(tmp_path, tmp_path / "a.txt", encoding="utf-16-le"))) == TEXT
    assert_rejected(
        config(tmp_path, tmp_path / "a.txt", encoding="utf-16"), r"a\.txt has no byte order mark: .*utf-16-be"
    )


@given(st.binary(max_size=60), st.sampled_from(["utf-8", "ascii", "utf-16-le", "cp1252"]))
def test_undecodable_bytes_become_one_character_for_each_sequence(tmp_path_factory, raw, encoding):
    path = tmp_path_factory.mktemp("file") / "a"
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "ALWAYS_REPLACED", 100)
        patch.setattr(decode, "CHUNK", 7)
        patch.setattr(decode, "BOMS", {})
        patch.setattr(decode._Decoder, "_look_for_utf8", lambda *_: None)
        text = "".join(decode.read_chunks(path, encoding, decode.Tally()))
    assert text == raw.decode(encoding, "replace")


def test_an_encoding_has_one_name_and_does_not_rename_old_runs():
    assert DataConfig(encoding="UTF8").encoding == DataConfig().encoding == "utf-8"
    assert DataConfig(encoding="latin1").encoding == DataConfig(encoding="iso-8859-1").encoding
    assert "data.encoding" not in identity({"data": {"encoding": "utf-8"}})
    assert identity({"data": {"encoding": "cp1252"}}) == {"data.encoding": "cp1252"}
    assert Config().data.encoding == "utf-8"
    for name in ("klingon", "rot13", ""):
        with pytest.raises(ValueError, match=rf"^data\.encoding={name} is unknown"):
            DataConfig(encoding=name)


# --- what is skipped ------------------------------------------------------------------------


def test_what_is_skipped_in_a_folder_is_said_at_every_start(tmp_path, capsys, monkeypatch):
    root = tmp_path / "texts"
    (root / ".git").mkdir(parents=True)
    (root / "a.txt").write_text("some words " * 20)
    for name in ("b.json", "c.csv.gz", "d.tsv", "e.JSON"):
        (root / name).write_text("{}")
    (root / "f.pdf").write_bytes(b"%PDF-1.7 and so on")
    (root / "g.gz").write_bytes(b"no gzip")
    (root / "linked").symlink_to(tmp_path)
    (root / "broken").symlink_to(tmp_path / "none")
    os.mkfifo(root / "pipe")
    said = [
        line for _ in range(2) for line in (prepare(config(tmp_path, root)), capsys.readouterr().err.splitlines()[-1])
    ]
    skipped = (
        "skipped .git: hidden; b.json, c.csv.gz, d.tsv and 1 more: not read, because it is a table or one JSON value: "
        "convert it to jsonl, one object per line, or parquet; broken, pipe: no regular file or a broken link; "
        "f.pdf: a PDF (extract its text first, for example with pdftotext); "
        "g.gz: not readable: Not a gzipped file (b'no'); linked: a link to a folder"
    )
    assert said[1].endswith(f"; {skipped}")
    assert said[3] == f"{said[2]}: {skipped}"
    monkeypatch.setenv("RANK", "1")
    prepare(config(tmp_path, root))
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_opened_is_skipped_with_the_reason(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")

    def denied(path):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return path.open("rb")

    monkeypatch.setattr("nanodisp.data.documents.open_bytes", denied)
    files, (skipped,) = find_files(tmp_path, "utf-8")
    assert [file.name for file in files] == ["b.txt"]
    assert skipped.name == "a.txt" and "Permission denied" in skipped.reason


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.json.gz", "a.parquet.gz"])
def test_what_is_no_text_is_rejected_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_text('{"text": "x"}')
    assert_rejected(config(tmp_path, tmp_path / name), "is (not read, .*convert it to jsonl|parquet in gzip)")
    (tmp_path / "texts").mkdir()
    (tmp_path / name).rename(tmp_path / "texts" / name)
    assert_rejected(config(tmp_path, tmp_path / "texts"), f"holds no file of text, .*; skipped {name}: ")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"%PDF-1.7 and so on", r"is a PDF \(extract its text first"),
        (b"PK\3\4 and so on", r"is a zip archive or an office document, such as docx, odt or epub \(unpack it, or "),
        (b"\xd0\xcf\x11\xe0\0", r"is an office document, such as doc or xls \(save it as text"),
        (b"{\\rtf1 and so on", r"is rich text \(save it as plain text"),
        (gzip.compress(b"some words"), r"is gzip \(give it a name that ends in \.gz"),
        (b"PAR1 and so on", r"is parquet \(give it a name that ends in \.parquet"),
        (b"(\xb5/\xfd and so on", r"is compressed with zstd \(decompress it"),
        (b"\0\1\2", r"is not text \(binary, or UTF-16"),
    ],
    ids=["pdf", "docx", "doc", "rtf", "gzip", "parquet", "zstd", "binary"],
)
def test_the_kind_of_a_file_that_is_no_text_is_named(tmp_path, head, message):
    (tmp_path / "a.txt").write_bytes(head)
    assert_rejected(config(tmp_path, tmp_path / "a.txt"), rf"a\.txt {message}.*\); a corpus is text, jsonl, parquet or")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(head))
    assert_rejected(config(tmp_path, tmp_path / "a.txt.gz"), message)


def test_a_text_and_its_gzip_are_one_text(tmp_path, capsys):
    root = tmp_path / "texts"
    root.mkdir()
    (root / "a.txt").write_text("x" * 100)
    for name in ("a.txt.gz", "A.txt.gz"):
        (root / name).write_bytes(gzip.compress(b"x" * 100))
    assert len(text_of(prepare(config(tmp_path, root, val_fraction=0.1)))) == 200
    assert capsys.readouterr().err.endswith("; skipped a.txt.gz: the same file is there without .gz\n")


def test_a_device_or_a_socket_is_rejected(tmp_path):
    assert_rejected(config(tmp_path, "/dev/null"), "data.path=/dev/null is a device, a pipe or a socket")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        assert_rejected(config(tmp_path, tmp_path / "s"), "is a device, a pipe or a socket")
    assert_rejected(config(tmp_path, "x" * 300), "cannot be read: .*File name too long")


# --- documents without text, and failures ----------------------------------------------------


def test_nulls_are_skipped_and_counted_with_the_first_line(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": None}, {"text": "two"}, {"text": None}])
    folder = prepare(config(tmp_path, path, val_fraction=0.5))
    assert sorted(documents_of(folder, "train") + documents_of(folder, "val")) == ["one", "two"]
    assert f"null documents skipped: 2, the first in {path} line 2" in capsys.readouterr().err
    only = write_jsonl(tmp_path / "b.jsonl", [{"text": None}])
    assert_rejected(config(tmp_path, only), "too little text: .*null documents skipped: 1, the first in .* line 1")


def test_nulls_of_parquet_are_counted_too(tmp_path, capsys):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", None, "two", "six"]}), tmp_path / "a.parquet")
    prepare(config(tmp_path, tmp_path / "a.parquet", val_fraction=0.3))
    assert "null documents skipped: 1, the first in " in capsys.readouterr().err


@pytest.mark.parametrize("shard_tokens", [1000, 100_000_000])
def test_a_failed_preparation_leaves_no_folder(tmp_path, shard_tokens):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 100}] * 50 + [{}])
    assert_rejected(config(tmp_path, path, shard_tokens=shard_tokens), "line 51 has no 'text'")
    assert not (tmp_path / "prepared").exists()
