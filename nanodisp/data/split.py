"""Which documents, and which parts of documents, are for validation.

File names decide where they say so. Otherwise every k-th document is held out, k = round(1 / val_fraction), if that
gives about the share that was asked for. If it does not, which is usual for few documents or for very unequal ones,
each large document gives its end, and as many small ones are held out as are needed, spread over the collection.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from nanodisp.data.documents import Piece, Skipped, counted, join_and_cut
from nanodisp.errors import UserError

GOLDEN = 0.6180339887498949  # i * GOLDEN % 1 below any limit: indices i without a period, evenly spread
NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


# --- by name -----------------------------------------------------------------------------


def split_by_name(files: Sequence[Path], root: Path) -> tuple[dict[Path, str], list[Skipped]]:
    """The split of each file, and the files left out because they are for testing.

    The last train, val, valid, validation or test among the words of a file's path below `root` counts; a file without
    one is for training. `dev` counts as `val` where a file is named `train` and none `val`; not otherwise, because
    folders of source code have a `dev` too. Where no file is for validation, `split_by_size` decides.

    Raises:
        UserError: no file for training.
    """
    paths = {file: file.relative_to(root).as_posix() for file in files}
    named = _named(paths, NAMES)
    if "train" in named.values() and "val" not in named.values():
        named = _named(paths, NAMES | {"dev": "val"})
    named = {file: named.get(file, "train") for file in files}
    splits = {file: split for file, split in named.items() if split != "test"}
    if "train" not in splits.values():
        raise UserError(f"data.path={root} holds no text for training: by their names, all files are for val or test")
    return splits, [Skipped(paths[file], "for testing, by its name") for file in files if named[file] == "test"]


def _named(paths: Mapping[Path, str], names: Mapping[str, str]) -> dict[Path, str]:
    """The split of each file whose path has one of the names among its words; the last one counts."""
    words = {file: [w for w in re.findall("[a-z]+", path.lower()) if w in names] for file, path in paths.items()}
    return {file: names[found[-1]] for file, found in words.items() if found}


# --- by size -----------------------------------------------------------------------------


class Split(NamedTuple):
    """The split of a collection.

    rule: in words, for the user.
    key: identifies another rule than every k-th document.
    n_train: of each document, how many of its bytes in UTF-8 are for training; those after it are for validation.
    """

    rule: str
    key: str | None
    n_train: array[int]


def split_by_size(sizes: array[int], val_fraction: float) -> Split:
    """Hold out `val_fraction` of the bytes of documents with these sizes.

    Every k-th document may miss it by a tenth, or by a quarter if that is less than a document; the other rule, by half
    of its largest document that is not cut.
    """
    k, wanted = round(1 / val_fraction), sum(sizes) * val_fraction
    error = abs(sum(sizes[::k]) - wanted)
    if error <= max(wanted / 10, min(wanted / 4, max(sizes, default=0))):
        n_train = array("q", (size if i % k else 0 for i, size in enumerate(sizes)))
        return Split(f"1 document in {k} for validation", None, n_train)
    n_train = array("q", (int(size * (1 - val_fraction)) if size > wanted / 2 else size for size in sizes))
    missing = wanted - (sum(sizes) - sum(n_train))
    for i in sorted(range(len(sizes)), key=lambda i: i * GOLDEN % 1):
        if sizes[i] <= wanted / 2:
            if missing < sizes[i] / 2:
                break
            n_train[i] = 0
            missing -= sizes[i]
    n_cut = sum(0 < n < size for n, size in zip(n_train, sizes, strict=True))
    return Split(f"{counted(n_cut, 'document')} cut", "by size", n_train)


def n_bytes(text: str) -> int:
    """The size of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def assign(documents: Iterable[Iterable[str]], sizes: Sequence[int], n_train: Sequence[int]) -> Iterator[Piece]:
    """The pieces of the documents with their splits. The two parts of a document are two documents."""
    for chunks, size, n in zip(documents, sizes, n_train, strict=True):
        if 0 < n < size:
            for split, part in groupby(_cut_at(chunks, n), key=itemgetter(0)):
                yield from (Piece(split, text, ends) for text, ends in join_and_cut(map(itemgetter(1), part)))
        else:
            split = "train" if n else "val"
            yield from (Piece(split, text, ends) for text, ends in join_and_cut(chunks))


def _cut_at(chunks: Iterable[str], position: int) -> Iterator[tuple[str, str]]:
    """(split, chunk): cut before the first character that begins at `position` or after it, in bytes of UTF-8."""
    for chunk in chunks:
        size = n_bytes(chunk)
        if 0 < position < size:
            encoded = chunk.encode("utf-8", "replace")
            while position < size and encoded[position] & 0xC0 == 0x80:
                position += 1
            head = len(encoded[:position].decode())
            yield "train", chunk[:head]
            if head < len(chunk):
                yield "val", chunk[head:]
        else:
            yield "train" if position > 0 else "val", chunk
        position -= size


# --- of a stream -----------------------------------------------------------------------------


def split_stream(parts: Iterable[tuple[str, bool]], val_fraction: float) -> Iterator[Piece]:
    """Hold out `val_fraction` of the documents of a stream, whose sizes are not known; parts are (text, ends).

    Documents 0, k, 2k, … if `every_kth_is` about the share, else as many, spread evenly.
    """
    share = Fraction(1, round(1 / val_fraction)) if every_kth_is(val_fraction) else Fraction(str(val_fraction))
    document = 0
    for text, ends in parts:
        yield Piece("val" if document * share % 1 < share else "train", text, ends)
        document += ends


def every_kth_is(val_fraction: float) -> bool:
    """Whether every k-th document, k = round(1 / val_fraction), is this share of the documents, within a tenth."""
    return abs(1 / round(1 / val_fraction) - val_fraction) <= val_fraction / 10
