"""Documents from files (plain text, jsonl, parquet; text and jsonl also in gzip) and from the Hugging Face hub.

A corpus is a stream of pieces: documents, the long ones cut, in the order of the file
names. Only one piece is in memory at a time, however large a text file is. A long
document is cut between a word and the white space after it, where no tokenizer of
`tokenizer.py` merges across: the pieces give the same tokens as the uncut document.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from nanodisp.data.decode import Tally, byte_order_mark, kind_of, open_bytes, read_chunks, reported
from nanodisp.errors import UserError, one_line

PIECE = 1 << 18  # characters: long enough to keep a core busy, short enough to keep many in memory
WORD_END = re.compile(r".*[^\W_](?=\s)", re.DOTALL)  # greedy: up to the last word followed by white space
SNIFFED = 8192  # bytes at the beginning in which a binary file has a zero byte
JSONL, PARQUET = (".jsonl", ".ndjson"), ".parquet"
TABLES = "not read, because it is a table or one JSON value: convert it to jsonl, one object per line, or parquet"
UNREAD = {".json": TABLES, ".csv": TABLES, ".tsv": TABLES, ".parquet.gz": "parquet in gzip: decompress it"}


class Piece(NamedTuple):
    """A document or a part of one. `ends` marks the document's last piece; only an empty document has an empty one."""

    split: str
    text: str
    ends: bool


# --- which files -------------------------------------------------------------------------


class Skipped(NamedTuple):
    """Something in a folder that is not part of the corpus, by its name below the folder."""

    name: str
    reason: str


def find_files(path: Path, encoding: str) -> tuple[list[Path], list[Skipped]]:
    """The files of a corpus, sorted, and what was skipped: `path` itself, or all below it that can be read.

    Raises:
        UserError: no such path, or no text in it.
    """
    with reported(path):
        if path.is_file():
            if reason := _unreadable(path, encoding):
                raise UserError(f"data.path={path} is {reason}; a corpus is text, jsonl, parquet or a folder of these")
            return [path], []
        if path.exists() and not path.is_dir():
            raise UserError(f"data.path={path} is a device, a pipe or a socket; give a file or a folder")
        if not path.exists():
            raise UserError(
                f"data.path={path} does not exist; give a file of text, jsonl or parquet, or a folder of these"
            )
    reasons = {found: reason or _unreadable(found, encoding) for found, reason in _walk(path)}
    for found in reasons:  # a.txt.gz beside a.txt
        if found.suffix.lower() == ".gz" and reasons.get(found.with_suffix(""), "missing") is None:
            reasons[found] = reasons[found] or "the same file is there without .gz"
    files = [found for found, reason in reasons.items() if reason is None]
    skipped = sorted(Skipped(each.relative_to(path).as_posix(), reason) for each, reason in reasons.items() if reason)
    if not files:
        raise UserError(f"data.path={path} holds no file of text, jsonl or parquet{_because(skipped)}")
    return sorted(files, key=lambda file: file.relative_to(path)), skipped


def _walk(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Everything below a folder that is not a folder or is not entered, with the reason to skip it, if any."""
    failed: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=failed.append):
        here = Path(folder)
        for name in [*folders, *names]:
            path = here / name
            if name.startswith("."):
                yield path, "hidden"
            elif name not in folders:
                yield path, None if path.is_file() else "no regular file or a broken link"
            elif path.is_symlink():
                yield path, "a link to a folder"
        folders[:] = [name for name in folders if not name.startswith(".")]
    for error in failed:
        yield Path(error.filename), f"not readable: {error.strerror}"


def _unreadable(path: Path, encoding: str) -> str | None:
    """Why a file cannot be part of a corpus; None if it can. A binary file has a zero byte near its beginning."""
    name = path.name.lower()
    for ending, reason in UNREAD.items():
        if name.endswith((ending, f"{ending}.gz")):
            return reason
    if is_jsonl(path) or is_parquet(path):
        return None
    try:
        with reported(path), open_bytes(path) as file:
            head = file.read(SNIFFED)
    except UserError as error:
        return f"not readable: {error.__cause__}"
    if kind := kind_of(head):
        return kind
    if b"\0" in head and not byte_order_mark(head) and not encoding.startswith(("utf-16", "utf-32")):
        return "not text (binary, or UTF-16 without a byte order mark, which needs data.encoding=utf-16-le or -be)"
    return None


def _because(skipped: list[Skipped]) -> str:
    return f"; skipped {describe(skipped)}" if skipped else ""


def describe(skipped: Iterable[Skipped]) -> str:
    """What was skipped and why, by reason, with the first three names of each."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped:
        names.setdefault(reason, []).append(name)
    parts = [f"{', '.join(n[:3])}{f' and {len(n) - 3:,} more' if len(n) > 3 else ''}: {r}" for r, n in names.items()]
    return "; ".join(parts)


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def is_jsonl(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(JSONL)


def read_as(path: Path) -> str:
    """How a file is read if version 0.1.0 read it otherwise, for the identity of a corpus; empty if it did not."""
    with reported(path), path.open("rb") as file:
        mark = byte_order_mark(file.read(4))
    if is_jsonl(path) and not path.name.endswith((".jsonl", ".jsonl.gz")):
        return " as jsonl"
    return " without its byte order mark" if mark and is_text(path) else ""


def is_text(path: Path) -> bool:
    """Whether a file of a corpus is plain text, one document."""
    return not is_jsonl(path) and not is_parquet(path)


def is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(PARQUET)


# --- documents ---------------------------------------------------------------------------


def read_documents(file: Path, field: str, encoding: str, tally: Tally) -> Iterator[Iterable[str]]:
    """The documents of a file, each as chunks of its text: a text file that is not empty, a line, a row."""
    if is_parquet(file):
        yield from ((text,) for text in read_parquet(file, field, tally))
    elif is_jsonl(file):
        yield from ((text,) for text in read_jsonl(file, field, encoding, tally))
    else:
        chunks = read_chunks(file, encoding, tally)
        first = next(chunks, "")
        tally.empty += not first
        if first:
            yield chain((first,), chunks)


def cut(document: str) -> Iterator[tuple[str, bool]]:
    """(text, ends) of the pieces of a document, each of at most PIECE characters."""
    return join_and_cut((document,))


def join_and_cut(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(text, ends) of the pieces of the document that the chunks join to."""
    text = ""
    for chunk in chunks:
        text += chunk
        start = 0
        while len(text) - start > PIECE:
            stop = _piece_end(text, start)
            yield text[start:stop], False
            start = stop
        text = text[start:]
    yield text, True


def _piece_end(text: str, start: int) -> int:
    word_end = WORD_END.match(text, start, start + PIECE)
    return word_end.end() if word_end else start + PIECE  # 262,144 characters without the end of a word


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        parts.append(first)
        if others:
            yield "".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield "".join(parts)


def read_jsonl(path: Path, field: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The string under `field` of each line; blank lines and nulls are skipped."""
    for number, line in enumerate(_lines(read_chunks(path, encoding, tally)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not an object with text under {field!r}")
        if field not in row:
            raise UserError(f"{path} line {number} has no {field!r} (its keys are {', '.join(row)}); set data.field")
        if row[field] is None:
            tally.null += 1
            tally.first_null = tally.first_null or f"{path} line {number}"
        elif not isinstance(row[field], str):
            kind = type(row[field]).__name__
            raise UserError(f"{path} line {number} has no text under {field!r} but a value of type {kind}")
        else:
            yield row[field]


def read_parquet(path: Path, field: str, tally: Tally) -> Iterator[str]:
    """The strings of the column `field`; empty ones and nulls are skipped."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install 'nanodisp[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [column.name for column in schema if arrow.types.is_string(column.type)]
            texts += [column.name for column in schema if arrow.types.is_large_string(column.type)]
            if field not in texts:
                raise UserError(f"{path} has no text column {field!r} (it has {', '.join(texts)}); set data.field")
            batches = file.iter_batches(batch_size=1024, columns=[field])
            rows = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(rows, start=1):
                if text:
                    yield text
                elif text is None:
                    tally.null += 1
                    tally.first_null = tally.first_null or f"{path} row {number}"
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error


def read_hub(repo: str, subset: str | None, split: str, field: str | None) -> Iterator[Any]:
    """The values of column `field` (None: whole rows) of a dataset on the Hugging Face hub or in a folder, streamed.

    Uses the network only when the first value is requested.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{repo} needs the datasets library: pip install 'nanodisp[data]'") from error
    try:
        for row in load_dataset(repo, subset, split=split, streaming=True):
            yield row if field is None else row[field]
    except Exception as error:  # of many types, from three libraries and the network
        raise UserError(f"dataset {repo} cannot be read: {one_line(error)}") from error


TITLE = re.compile(r" = [^=].* = \n?")  # of an article of WikiText; titles of sections have two or more equals signs


def wikitext_articles(lines: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText, joined from its lines."""
    article: list[str] = []
    for line in lines:
        if TITLE.fullmatch(line) and "".join(article).strip():
            yield "".join(article)
            article = []
        article.append(line)
    if "".join(article).strip():
        yield "".join(article)
