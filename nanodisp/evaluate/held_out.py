"""Passages to fit transforms on: other text than what is scored, cut to the same length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanodisp.data.batches import spread_windows
from nanodisp.data.decode import read_whole
from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import Embedder, Embeddings, embed, is_empty
from nanodisp.hf.corpus import folder_of_data, read_some_documents

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
PASSAGES = 1500  # to fit a transform on, or PER_FEATURE for each feature of the model, whichever is more
PER_FEATURE = 4
FEWEST = 16  # passages


@dataclass
class HeldOut:
    """Documents that are not scored, and where they are from; or why there are none.

    documents: empty without held-out text.
    source: of the documents, or the reason, for the reader.
    """

    documents: list[str]
    source: str


def open_held_out(embedder: Embedder, text: str | None, split: str) -> HeldOut:
    """The text file `text`, else documents of a split of the run's data; raises UserError for a bad file."""
    if text is not None:
        return HeldOut([read_whole(Path(text), f"text={text}")], Path(text).name)
    subject = embedder.subject
    try:
        folder = folder_of_data(subject, "give text=<file>")
    except UserError as error:
        return HeldOut([], str(error))
    assert subject.load_tokenizer is not None  # a run's
    tokenizer = subject.load_tokenizer()
    read = read_some_documents(folder, split, tokenizer, subject.vocab_size)
    documents = [tokenizer.decode_bytes(tokens.tolist()).decode("utf-8", "replace") for tokens in read]
    return HeldOut(documents, f"the {'training' if split == 'train' else 'validation'} split of {folder.name}")


def passages(documents: Sequence[str], characters: int) -> Iterator[str]:
    """The sentences of documents, joined until they have `characters`; a longer one is cut into parts of so many."""
    for document in documents:
        passage = ""
        for sentence in SENTENCE_END.split(document):
            passage = f"{passage} {sentence}".strip() if passage else sentence.strip()
            while len(passage) > 2 * characters:
                yield passage[:characters]
                passage = passage[characters:].strip()
            if len(passage) >= characters:
                yield passage
                passage = ""
        if passage:
            yield passage


def embed_held_out(
    embedder: Embedder, held_out: HeldOut, texts: Sequence[str], scored: Embeddings
) -> tuple[Tensor | None, str]:
    """Vectors [layers, poolings, n, F] of passages as long as `texts`, and a line about them.

    Args:
        scored: the embeddings of the texts that are scored, of all layers and poolings.

    None if there is too little text; the line says why.
    """
    characters = max(1, round(scored.share * sum(map(len, texts)) / len(texts)))
    found = [passage for passage in passages(held_out.documents, characters) if not is_empty(passage)]
    wanted = max(PASSAGES, PER_FEATURE * scored.vectors.size(-1))
    chosen = [found[i] for i in spread_windows(len(found), wanted).tolist()]
    if not held_out.documents:
        return None, f"only raw embeddings are scored: {held_out.source}"
    if len(chosen) < FEWEST:
        return (
            None,
            f"only raw embeddings are scored: {held_out.source} has {len(chosen)} passages, {FEWEST} are needed",
        )
    line = f"fitted on {len(chosen):,} passages of {held_out.source}"
    if len(chosen) < 2 * scored.vectors.size(-1):
        line += f"; too few for {scored.vectors.size(-1)} features, so that whitening enlarges noise"
    return embed(embedder, chosen).vectors, line


def stack(*parts: Embeddings) -> Embeddings:
    """Embeddings of several lists of texts as if they had been one."""
    counts = [part.vectors.size(2) for part in parts]
    share = sum(part.share * n for part, n in zip(parts, counts, strict=True)) / sum(counts)
    return Embeddings(torch.cat([part.vectors for part in parts], dim=2), sum(part.n_cut for part in parts), share)
