"""The data that a run was trained on, opened again: to measure it on, or for texts that it is not scored on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanodisp.data.batches import spread_windows
from nanodisp.data.corpus import fingerprint, open_corpus
from nanodisp.data.prepare import DATA, prepare
from nanodisp.data.shards import MANIFEST, check_tokens, open_split
from nanodisp.data.tokenizer import Tokenizer
from nanodisp.errors import UserError
from nanodisp.hf.open import Measurable

CHUNKS, CHUNK = 64, 16_384  # parts of a split that documents are read from, and tokens of each


def folder_of_data(subject: Measurable, others: str) -> Path:
    """The folder of shards of a run.

    Raises UserError that ends with `others`, what to do instead, if the data are missing or have changed since.
    """
    if subject.data is None:
        raise UserError(f"{subject.name} comes without data: {others}")
    kept = Path(subject.data.folder or DATA / subject.data.name) / str(subject.corpus)
    try:
        folder = kept if (kept / MANIFEST).exists() else prepare(subject.data)
    except UserError as error:
        raise UserError(f"the data of {subject.name} cannot be read ({error}): {others}") from error
    has_its_name = folder.name == subject.corpus
    same = has_its_name  # all that a run of version 0.1.0 tells
    if subject.fingerprint is not None:
        same = subject.fingerprint == fingerprint(open_corpus(folder, "none"))
    if same:
        return folder
    if has_its_name:
        raise UserError(f"{folder} has changed since {subject.name} was trained on it: {others}")
    raise UserError(f"{folder} is not what {subject.name} was trained on, {subject.corpus}: {others}")


def read_some_documents(folder: Path, split: str, tokenizer: Tokenizer, vocab_size: int) -> Iterator[np.ndarray]:
    """Tokens of documents of a split, without end-of-text: at most a million tokens, spread evenly over the split.

    A document at the edge of a part, of 16,384 tokens, is cut there.
    """
    tokens = open_split(folder, split)
    for number in spread_windows(-(-len(tokens) // CHUNK), CHUNKS).tolist():
        chunk = tokens.read(number * CHUNK, min((number + 1) * CHUNK, len(tokens)))
        check_tokens(chunk, vocab_size, folder)
        for document in np.split(chunk, np.flatnonzero(chunk == tokenizer.eot)):
            if len(document := document[document != tokenizer.eot]):
                yield document
