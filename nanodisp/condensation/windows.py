"""The text that a model is measured on, as windows of tokens: cut out of one stream, or the beginnings of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanodisp.data.batches import spread_windows
from nanodisp.data.decode import Tally, read_whole
from nanodisp.data.documents import find_files, is_text, read_documents
from nanodisp.data.prepare import DataConfig, prepare
from nanodisp.data.shards import Manifest, check_tokens, open_split
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.errors import UserError
from nanodisp.hf.corpus import folder_of_data
from nanodisp.hf.open import PROBE, Measurable

LONGEST_BLOCK = 512  # tokens of a window, unless `block` is given
TOKENS_AT_ONCE = 2048  # tokens per forward pass
CHARACTERS = 8  # of a token, at most, as far as texts are long enough for their number of tokens


def block_of(subject: Measurable, block: int | None) -> int:
    """Tokens of a window, `block` or the model's context up to 512; raises UserError if the context is shorter."""
    block = block or min(subject.context, LONGEST_BLOCK)
    if block > subject.context:
        raise UserError(f"block={block} is longer than the model's context of {subject.context} tokens")
    return block


def open_windows(
    subject: Measurable, text: str | None, data: str | None, n_windows: int, block: int | None
) -> Iterator[Tensor]:
    """Windows spread evenly over a text, as batches, int64 [B, T].

    Args:
        text: a file, read as one text; else None.
        data: a folder of shards; None, without a text either, is the run's own.
        n_windows, block: how many, and their tokens; None as in `block_of`.

    Raises UserError without data, or if it is shorter than one window.
    """
    block = block_of(subject, block)
    if text is not None:
        where, ids = f"text={text}", subject.encode(read_whole(Path(text), f"text={text}"))
        if (highest := ids.max(initial=0)) >= subject.vocab_size:
            raise UserError(
                f"the tokenizer of {subject.name} gives token {highest}, the model has {subject.vocab_size}"
            )
        n_tokens, read = len(ids), lambda start, stop: ids[start:stop]
    else:
        folder = open_data(subject, data)
        tokens = open_split(folder, "val")
        where, n_tokens = f"the validation split of {folder}", len(tokens) - 1  # the last is a target
        read = tokens.read
    if n_tokens < block:
        hint = f", or block={n_tokens}" if n_tokens > 1 else ""
        raise UserError(f"{where} has {n_tokens} tokens, a window {block}: give a longer text{hint}")
    chosen = spread_windows(n_tokens // block, n_windows)
    rows = (read(start, start + block) for start in (chosen * block).tolist())
    yield from batched(rows, block, subject.vocab_size, where)


def open_data(subject: Measurable, data: str | None) -> Path:
    """The folder of shards to measure on; raises UserError if the run's data are missing or have changed since."""
    others = "give text=<file> or data=<folder of shards>"
    if data is not None:
        folder = prepare(DataConfig(name="shards", path=data))
        check_tokenizer(folder, subject)
        return folder
    return folder_of_data(subject, others)


def check_tokenizer(folder: Path, subject: Measurable) -> None:
    """Raises UserError if the tokenizers of shards and model are both available and differ."""
    try:
        ours = subject.encode(PROBE)
        theirs = load_tokenizer(Manifest.load(folder).tokenizer, folder).encode(PROBE)
    except UserError:
        return
    if ours.tolist() != theirs.tolist():
        raise UserError(f"data={folder} was made with another tokenizer than that of {subject.name}: give text=<file>")


def batched(rows: Iterable[np.ndarray], block: int, vocab_size: int, where: str) -> Iterator[Tensor]:
    """Windows of `block` tokens, [T] each, as batches int64 [B, T]; raises UserError for a token beyond the model's."""
    rest = iter(rows)
    while taken := list(islice(rest, max(1, TOKENS_AT_ONCE // block))):
        batch = np.stack(taken)
        check_tokens(batch, vocab_size, where)
        yield torch.from_numpy(batch.astype(np.int64))


# --- beginnings of texts ---------------------------------------------------------------------


def read_texts(path: Path, n: int, block: int) -> list[str]:
    """The beginnings of at most n texts, spread evenly, each long enough for `block` tokens of any usual tokenizer.

    A text is a document of a jsonl or parquet file or of a folder, or begins at a line of a plain text file, at one of
    n places at equal distances. Raises UserError if none is long enough.
    """
    size = block * CHARACTERS
    if path.is_file() and is_text(path):
        text = read_whole(path, f"text={path}")
        places = [number * max(0, len(text) - size) // n for number in range(n)]
        lines = sorted({text.rfind("\n", 0, place) + 1 for place in places})
        found = [text[start : start + size] for start in lines]
    else:
        found, tally = [], Tally()
        try:
            for file in find_files(path, "utf-8")[0]:
                for chunks in read_documents(file, "text", "utf-8", tally):
                    found.append(beginning(chunks, size))
        except UserError as error:  # of data=text, which has other keys
            line = str(error).replace("data.path=", "text=").replace("set data.field", "the texts must be in 'text'")
            raise UserError(line) from error
    found = [text for text in found if len(text) == size]
    if not found:
        raise UserError(f"text={path} has no text of {size:,} characters, which {block} tokens may need")
    return [found[number] for number in spread_windows(len(found), n).tolist()]


def beginning(chunks: Iterable[str], size: int) -> str:
    text = ""
    for chunk in chunks:
        text += chunk[: size - len(text)]
        if len(text) == size:
            break
    return text


def first_tokens(subject: Measurable, texts: list[str], block: int) -> Iterator[Tensor]:
    """The first `block` tokens of each text, as batches; raises UserError if a text has fewer."""

    def rows() -> Iterator[np.ndarray]:
        for text in texts:
            ids = subject.encode(text)
            if len(ids) < block:
                raise UserError(
                    f"{len(text):,} characters of a text are {len(ids)} tokens of {subject.name}: give block="
                )
            yield ids[:block]

    yield from batched(rows(), block, subject.vocab_size, f"the tokenizer of {subject.name}")
