"""Documents out of files: plain text, jsonl, parquet, and the Hugging Face hub's datasets.

A corpus is a stream of pieces: documents, the long ones cut, in an order that the files'
names decide. Only one piece is in memory at a time, however large a text file is. A long
document is cut between a word and the white space after it, where no tokenizer of
`tokenizer.py` would join the two: the tokens of the pieces are those of the whole.

Bytes that are not UTF-8 become U+FFFD, one for each malformed sequence; half a file in
another encoding is better noticed in the samples than lost in an error at its last byte.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nanodisp.errors import UserError

PIECE = 1 << 18  # characters: long enough to keep a core busy, short enough to keep many in memory
WORD_END = re.compile(r".*[^\W_](?=\s)", re.DOTALL)  # greedy: up to the last word that white space follows
SNIFFED = 8192  # bytes in which a file that is not text shows a zero byte
JSONL, PARQUET = (".jsonl", ".jsonl.gz"), (".parquet",)


class Piece(NamedTuple):
    """A document or a part of one. `ends` marks the document's last piece; only an empty document's text is empty."""

    split: str
    text: str
    ends: bool


# --- which files -------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """The files of a corpus: `path` itself, or all below it but hidden and binary ones, sorted.

    Raises:
        UserError: there is no such path, it is not text, or nothing in it is.
    """
    if path.is_file():
        if not _is_readable(path):
            raise UserError(f"data.path={path} is not text; a corpus is text, jsonl, parquet or a folder of these")
        return [path]
    if not path.is_dir():
        raise UserError(f"data.path={path} does not exist; give a file of text, jsonl or parquet, or a folder of these")
    inside = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = [path / name for name in inside if not any(part.startswith(".") for part in name.parts)]
    readable = [file for file in files if _is_readable(file)]
    if not readable:
        raise UserError(f"data.path={path} holds no text, jsonl or parquet file among its {len(files)} files")
    return readable


def _is_readable(path: Path) -> bool:
    return path.name.endswith(JSONL + PARQUET) or is_text(path)


def is_text(path: Path) -> bool:
    """Whether a file is plain text by git's rule: no zero byte near its beginning."""
    with _told_as_user_error(path), path.open("rb") as file:
        return not path.name.endswith(JSONL + PARQUET) and b"\0" not in file.read(SNIFFED)


# --- pieces ------------------------------------------------------------------------------


def read_files(files: Sequence[Path], field: str, val_fraction: float) -> Iterator[Piece]:
    """The pieces of a corpus with their splits.

    One text file gives its last `val_fraction` of bytes to validation, its two sides being
    two documents. Otherwise every file of text, every line of jsonl and every row of
    parquet is a document, and `every_kth_to_val` deals them out.
    """
    if len(files) == 1 and is_text(files[0]):
        size = files[0].stat().st_size
        cut = _character_start(files[0], int(size * (1 - val_fraction)))
        yield from (Piece("train", text, ends) for text, ends in read_text(files[0], 0, cut))
        yield from (Piece("val", text, ends) for text, ends in read_text(files[0], cut, size))
        return
    parts = (part for file in files for part in _read_file(file, field))
    yield from every_kth_to_val(parts, val_fraction)


def every_kth_to_val(parts: Iterable[tuple[str, bool]], val_fraction: float) -> Iterator[Piece]:
    """Documents 0, k, 2k, … go to validation, k = round(1 / val_fraction); parts are (text, ends)."""
    k, document = round(1 / val_fraction), 0
    for text, ends in parts:
        yield Piece("train" if document % k else "val", text, ends)
        document += ends


def cut(document: str) -> Iterator[tuple[str, bool]]:
    """(text, ends) of the pieces of a document, each of at most PIECE characters."""
    start = 0
    while len(document) - start > PIECE:
        stop = _piece_end(document, start)
        yield document[start:stop], False
        start = stop
    yield document[start:], True


def _piece_end(text: str, start: int) -> int:
    word_end = WORD_END.match(text, start, start + PIECE)
    return word_end.end() if word_end else start + PIECE  # a quarter of a million characters without a word


def _read_file(path: Path, field: str) -> Iterator[tuple[str, bool]]:
    if path.name.endswith(PARQUET):
        yield from (part for document in read_parquet(path, field) for part in cut(document))
    elif path.name.endswith(JSONL):
        yield from (part for document in read_jsonl(path, field) for part in cut(document))
    else:
        yield from read_text(path, 0, path.stat().st_size)


def read_text(path: Path, start: int, stop: int) -> Iterator[tuple[str, bool]]:
    """(text, ends) of the pieces of the document that a file's bytes start to stop - 1 are; none if empty."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    with _told_as_user_error(path), path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(min(PIECE, stop - file.tell())):
            text += decoder.decode(chunk)
            while len(text) > PIECE:
                end = _piece_end(text, 0)
                yield text[:end], False
                text = text[end:]
    text += decoder.decode(b"", final=True)
    if text:
        yield text, True


def _character_start(path: Path, position: int) -> int:
    """The first byte from `position` on that does not continue a UTF-8 character."""
    with path.open("rb") as file:
        file.seek(position)
        following = file.read(4)
    return position + len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """The string under `field` of each line; blank lines are skipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with _told_as_user_error(path), opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                found = f"its keys are {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
                raise UserError(f"{path} line {number} has no text under {field!r} ({found}); set data.field")
            yield row[field]


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """The strings of the column `field`; nulls are skipped."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow to be read: pip install 'nanodisp[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [column.name for column in schema if arrow.types.is_string(column.type)]
            texts += [column.name for column in schema if arrow.types.is_large_string(column.type)]
            if field not in texts:
                raise UserError(f"{path} has no text column {field!r} (it has {', '.join(texts)}); set data.field")
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from filter(None, batch.column(0).to_pylist())
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error


def read_hub(repo: str, subset: str | None, split: str, field: str | None) -> Iterator[Any]:
    """What lies under `field` of a dataset on the Hugging Face hub, streamed, or of a folder in its place.

    Whole rows where `field` is None.

    Nothing is asked of the network before the first document is.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{repo} needs the datasets library: pip install 'nanodisp[data]'") from error
    try:
        for row in load_dataset(repo, subset, split=split, streaming=True):
            yield row if field is None else row[field]
    except Exception as error:  # of many kinds, from three libraries and the network
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"dataset {repo} cannot be read: {reason}") from error


@contextmanager
def _told_as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
