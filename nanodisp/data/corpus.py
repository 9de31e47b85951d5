"""A corpus: a folder of shards, opened."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from nanodisp.data.prepare import DataConfig, prepare
from nanodisp.data.shards import MANIFEST, Manifest, Tokens, open_split
from nanodisp.data.tokenizer import end_of_text, vocab_size_of
from nanodisp.distributed.world import World
from nanodisp.errors import UserError

CHUNK = 1 << 20  # tokens per read when all of them are read
LONGEST_DOCUMENT = 128  # chunks: a document that is longer counts as the only one
SAMPLES, SAMPLE = 256, 4096  # parts of a split, and tokens of each, by which it is known
CHARACTERS = "meta.pkl"  # nanoGPT writes it beside character-level shards


@dataclass(frozen=True)
class Corpus:
    """A folder of shards, opened.

    tokenizer: a spec for `load_tokenizer`; "none" if the tokens cannot be turned into text.
    vocab_size: the manifest's, None without one (see `count_vocabulary`).
    bytes_per_token: of the validation split, None if unknown.
    """

    folder: Path
    train: Tokens
    val: Tokens
    tokenizer: str
    vocab_size: int | None
    bytes_per_token: float | None


def open_for(config: DataConfig, world: World) -> Corpus:
    """The corpus of a run: the first rank of each machine prepares it if necessary while the others wait.

    On a shared disk one of these prepares it, and the others find it.
    """
    for turn in (True, False):
        with world.together():
            if (world.local_rank == 0) == turn:
                corpus = open_corpus(prepare(config), config.tokenizer)
    if world.is_main and config.name == "shards" and is_same(corpus.train, corpus.val):
        print(f"warning: the same tokens are for training and for validation in {corpus.folder}", file=sys.stderr)
    return corpus


def open_corpus(folder: Path, tokenizer: str) -> Corpus:
    """Open both splits; `tokenizer` is the spec for shards without a manifest.

    nanoGPT's `meta.pkl` beside them means characters, not GPT-2's tokens. It is a pickle and never opened.

    Raises UserError as `open_split` does.
    """
    train, val = open_split(folder, "train"), open_split(folder, "val")
    if not (folder / MANIFEST).exists():
        characters = tokenizer == "gpt2" and (folder / CHARACTERS).exists()
        return Corpus(folder, train, val, "none" if characters else tokenizer, None, None)
    manifest = Manifest.load(folder)
    beside = folder / manifest.tokenizer  # a file, if it is one
    spec = str(beside) if beside.is_file() else manifest.tokenizer
    return Corpus(folder, train, val, spec, manifest.vocab_size, manifest.bytes_per_token.get("val"))


def count_vocabulary(corpus: Corpus) -> int:
    """The vocabulary size: the manifest's, the tokenizer's, or the highest token id plus one.

    The last reads all tokens. Raises UserError if the tokenizer cannot be loaded.
    """
    if corpus.vocab_size is not None:
        return corpus.vocab_size
    if corpus.tokenizer != "none":
        return vocab_size_of(corpus.tokenizer)
    splits = (corpus.train, corpus.val)
    chunks = (s.read(start, min(start + CHUNK, len(s))) for s in splits for start in range(0, len(s), CHUNK))
    return 1 + max(int(chunk.max()) for chunk in chunks)


def is_same(a: Tokens, b: Tokens) -> bool:
    """Whether two splits hold the same tokens; reads them only if they are equally long."""
    chunks = ((start, min(start + CHUNK, len(a))) for start in range(0, len(a), CHUNK))
    return len(a) == len(b) and all(np.array_equal(a.read(*chunk), b.read(*chunk)) for chunk in chunks)


def fingerprint(corpus: Corpus) -> str:
    """Identifies the tokens without reading all of them, which would take a second per gigabyte at every start.

    From the length of both splits, the checksums of the manifest if there is one, and a million tokens spread evenly
    over each split.
    """
    state = blake2b(digest_size=16)
    for split in (corpus.train, corpus.val):
        state.update(repr((len(split), [shard.sha256 for shard in split.recorded or ()])).encode())
        for start in np.linspace(0, max(0, len(split) - SAMPLE), SAMPLES).astype(int).tolist():
            state.update(split.read(start, min(start + SAMPLE, len(split))).tobytes())
    return state.hexdigest()


def sample_start(corpus: Corpus) -> int | None:
    """The token that a sample without a prompt begins with, one that the model has learned to continue.

    End-of-text if a document of the training split follows one; otherwise, as for a single text, the split's first
    token. None if the tokenizer is not known.
    """
    try:
        end = end_of_text(corpus.tokenizer, corpus.vocab_size)
    except UserError:
        return None
    last = len(corpus.train) - 1  # nothing follows it
    for start in range(0, min(last, LONGEST_DOCUMENT * CHUNK), CHUNK):
        if (corpus.train.read(start, min(start + CHUNK, last)) == end).any():
            return end
    return int(corpus.train.read(0, 1)[0])
