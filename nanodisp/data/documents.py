"""Documents from files (plain text, jsonl, parquet) and from datasets on the Hugging Face hub.

A corpus is a stream of pieces: documents, the long ones cut, in the order of the file
names. Only one piece is in memory at a time, however large a text file is. A long
document is cut between a word and the white space after it, where no tokenizer of
`tokenizer.py` merges across: the pieces give the same tokens as the uncut document.

Bytes that are not UTF-8 become U+FFFD, one for each malformed sequence: a file in
another encoding is noticed in the samples, instead of failing after hours at one byte.
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
WORD_END = re.compile(r".*[^\W_](?=\s)", re.DOTALL)  # greedy: up to the last word followed by white space
SNIFFED = 8192  # bytes at the beginning in which a binary file has a zero byte
JSONL, PARQUET = (".jsonl", ".jsonl.gz"), (".parquet",)


class Piece(NamedTuple):
    """A document or a part of one. `ends` marks the document's last piece; only an empty document has an empty one."""

    split: str
    text: str
    ends: bool


# --- which files -------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """The files of a corpus: `path` itself, or all below it except hidden and binary ones, sorted.

    Raises:
        UserError: no such path, or no text in it.
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
    with _as_user_error(path), path.open("rb") as file:
        return not path.name.endswith(JSONL + PARQUET) and b"\0" not in file.read(SNIFFED)


# --- pieces ------------------------------------------------------------------------------


def read_files(files: Sequence[Path], field: str, val_fraction: float) -> Iterator[Piece]:
    """The pieces of a corpus with their splits.

    A single text file gives its last `val_fraction` of bytes to validation; the two parts are
    two documents. Otherwise every text file, every line of jsonl and every row of parquet is a
    document, and `every_kth_to_val` splits them.
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
    return word_end.end() if word_end else start + PIECE  # 262,144 characters without the end of a word


def _read_file(path: Path, field: str) -> Iterator[tuple[str, bool]]:
    if path.name.endswith(PARQUET):
        yield from (part for document in read_parquet(path, field) for part in cut(document))
    elif path.name.endswith(JSONL):
        yield from (part for document in read_jsonl(path, field) for part in cut(document))
    else:
        yield from read_text(path, 0, path.stat().st_size)


def read_text(path: Path, start: int, stop: int) -> Iterator[tuple[str, bool]]:
    """(text, ends) of the pieces of one document: bytes start to stop - 1 of a file. Nothing if it is empty."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    with _as_user_error(path), path.open("rb") as file:
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
    """The position of the first byte, at `position` or after it, that begins a UTF-8 character."""
    with path.open("rb") as file:
        file.seek(position)
        following = file.read(4)
    return position + len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """The string under `field` of each line; blank lines are skipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with _as_user_error(path), opener(path, "rb") as lines:
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
        raise UserError(f"{path} needs pyarrow: pip install 'nanodisp[data]'") from error
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
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"dataset {repo} cannot be read: {reason}") from error


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
