"""From the bytes of a file to its text: gzip, byte order marks, encodings, and bytes that cannot be decoded.

A byte order mark decides the encoding and is not part of the text. A malformed sequence becomes U+FFFD and is counted;
more than one byte in a thousand means another encoding than was assumed, which ends the preparation.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from nanodisp.errors import UserError

CHUNK = 1 << 18  # bytes
BOMS = {  # UTF-32's first: UTF-16's begins like it
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
PACKED = "(decompress it, or compress it with gzip)"
KINDS = {  # by the first bytes of a file that is no text, some of which have no zero byte
    b"%PDF-": "a PDF (extract its text first, for example with pdftotext)",
    b"PK\3\4": "a zip archive or an office document, such as docx, odt or epub (unpack it, or save it as text)",
    b"\xd0\xcf\x11\xe0": "an office document, such as doc or xls (save it as text)",
    b"{\\rtf": "rich text (save it as plain text)",
    b"\x1f\x8b": "gzip (give it a name that ends in .gz)",
    b"PAR1": "parquet (give it a name that ends in .parquet)",
    b"BZh91AY": f"compressed with bzip2 {PACKED}",
    b"\xfd7zXZ\0": f"compressed with xz {PACKED}",
    b"(\xb5/\xfd": f"compressed with zstd {PACKED}",
}
ALWAYS_REPLACED = 3  # undecodable bytes that even a short file may have
WESTERN, OTHERS = ("cp1252", "latin-1"), ("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "cp1251")


@dataclass
class Tally:
    """What was seen while files were read: undecodable bytes and the first of them, files and rows without text."""

    read: int = 0
    undecodable: int = 0
    first_undecodable: str = ""
    empty: int = 0
    null: int = 0
    first_null: str = ""

    def notes(self) -> list[str]:
        """One phrase for each thing seen."""
        notes = []
        if self.empty:
            notes.append(f"empty files: {self.empty:,}")
        if self.null:
            notes.append(f"null documents skipped: {self.null:,}, the first in {self.first_null}")
        if self.undecodable:
            notes.append(f"undecodable bytes replaced: {self.undecodable:,}, the first in {self.first_undecodable}")
        return notes


def open_bytes(path: Path) -> IO[bytes]:
    """The content of a file, decompressed if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def byte_order_mark(head: bytes) -> bytes:
    """The mark that `head`, the beginning of a file, begins with; empty without one."""
    return next((mark for mark in BOMS if head.startswith(mark)), b"")


def kind_of(head: bytes) -> str | None:
    """What a file that begins with `head` is, and what to do about it, if it is a known kind that is no text."""
    return next((kind for magic, kind in KINDS.items() if head.startswith(magic)), None)


def read_whole(path: Path, name: str) -> str:
    """The text of a file, strictly in UTF-8 or the encoding of its byte order mark; raises UserError that names it."""
    try:
        with open_bytes(path) as file:
            raw = file.read()
        if kind := kind_of(raw):
            raise UserError(f"{name} is {kind}")
        mark = byte_order_mark(raw)
        return raw[len(mark) :].decode(BOMS.get(mark, "utf-8"))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from error


def read_chunks(path: Path, encoding: str, tally: Tally) -> Iterator[str]:
    """The text of a file in chunks, none of them empty.

    Raises:
        UserError: the file cannot be read, or is in another encoding.
    """
    with reported(path), open_bytes(path) as file:
        raw = file.read(CHUNK)
        mark = byte_order_mark(raw)
        decoder = _Decoder(path, BOMS.get(mark, encoding), len(mark), tally)
        raw = raw[len(mark) :]
        while raw:
            if text := decoder.decode(raw):
                yield text
            raw = file.read(CHUNK)
        if text := decoder.decode(b"", final=True):
            yield text


class _Decoder:
    """Decodes a file chunk by chunk and counts what it cannot decode."""

    def __init__(self, path: Path, encoding: str, position: int, tally: Tally) -> None:
        self.path, self.encoding, self.position, self.tally = path, encoding, position, tally
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.chunk, self.undecodable, self.first = b"", 0, 0
        # Finds UTF-8 that is about to be read as something else; nothing else is likely to be valid UTF-8.
        self.utf8 = None if encoding == "utf-8" else codecs.getincrementaldecoder("utf-8")()
        self.is_ascii = True

    def decode(self, raw: bytes, final: bool = False) -> str:
        self._look_for_utf8(raw, final)
        self.chunk = raw or self.chunk
        self.position += len(raw)
        self.tally.read += len(raw)
        text = ""
        while True:
            try:
                return text + self.decoder.decode(raw, final)
            except UnicodeDecodeError as error:  # its object: bytes held back before, then raw
                self._count(error)
                self.decoder.reset()
                text += self.decoder.decode(error.object[: error.start]) + "\ufffd"
                raw = error.object[error.end :]
            except UnicodeError as error:  # of utf-16 alone, which needs the mark that decides the byte order
                raise UserError(f"{self.path} has no byte order mark: data.encoding=utf-16-le or utf-16-be") from error

    def _count(self, error: UnicodeDecodeError) -> None:
        tally, n_bytes = self.tally, error.end - error.start
        if not self.undecodable:
            self.first = self.position - len(error.object) + error.start
        where = f"{self.path} byte {self.first:,}"
        tally.first_undecodable = tally.first_undecodable or where
        self.undecodable += n_bytes
        tally.undecodable += n_bytes
        # Of all files together too: many short ones with a few such bytes each are in another encoding as well.
        for first, found, read in (
            (where, self.undecodable, self.position),
            (tally.first_undecodable, tally.undecodable, tally.read),
        ):
            if found > max(ALWAYS_REPLACED, read / 1000):
                raise UserError(
                    f"{first} is not {self.encoding} ({found} undecodable bytes in {read:,}); "
                    f"{_suggest(self.chunk, self.encoding)}"
                )

    def _look_for_utf8(self, raw: bytes, final: bool) -> None:
        if self.utf8 is None:
            return
        self.is_ascii = self.is_ascii and raw.isascii()
        try:
            self.utf8.decode(raw, final)
        except UnicodeDecodeError:
            self.utf8 = None
            return
        if final and not self.is_ascii and not self.encoding.startswith(("utf-16", "utf-32")):
            raise UserError(
                f"{self.path} is UTF-8, but data.encoding={self.encoding}; if the files differ in encoding, convert "
                f"the others: iconv -f {self.encoding} -t utf-8 <file>"
            )


def _suggest(sample: bytes, tried: str) -> str:
    """What to do about bytes that are not in the encoding that was tried."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    western = sum(map(len, runs)) < 2 * len(runs)  # single accented letters, not whole words
    fitting = [name for name in (WESTERN if western else OTHERS) if name != tried and _decodes(sample, name)]
    if not fitting:
        return "give its encoding as data.encoding=…, or remove the file if it is not text"
    return f"give data.encoding={fitting[0] if western else ' or '.join(fitting)}, or another if you know it"


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(sample)  # the last character may be incomplete
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
