"""Pieces of text to shards, on all cores, resumable.

Shards are written in rounds: when the shard of one split is full, those of both splits are
written, and then `progress.json`, which records how many pieces of the corpus they hold. A
killed preparation skips these pieces when run again and ends with the same bytes as an
uninterrupted one. Memory is bounded by two shards for any corpus. The manifest is written last.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import progress
from rich.console import Console

from nanodisp.data.documents import PIECE, Piece, counted
from nanodisp.data.shards import PROGRESS, SPLITS, Shard, describe_shard, write_shard
from nanodisp.data.split import n_bytes
from nanodisp.data.tokenizer import Tokenizer
from nanodisp.files import write_whole

LOCK = ".lock"


# --- pieces to tokens, on all cores ----------------------------------------------------------


class Tokenised(NamedTuple):
    """The tokens of a piece, with end-of-text if it ends a document, and the size of its text in UTF-8 bytes."""

    split: str
    tokens: np.ndarray
    n_bytes: int
    ends: bool


def _tokenise(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Tokenised]:
    """Tokenise in the order of the pieces. tiktoken releases the GIL, so threads are enough."""
    nothing = tokenizer.encode("")
    end = np.append(nothing, tokenizer.eot).astype(nothing.dtype)

    def work(batch: list[Piece]) -> list[Tokenised]:
        done = []
        for split, text, ends in batch:
            tokens = tokenizer.encode(text)
            ends = ends and text != ""
            if ends:
                tokens = np.concatenate([tokens, end])
            done.append(Tokenised(split, tokens, n_bytes(text), ends))
        return done

    n_workers = os.cpu_count() or 1
    with ThreadPoolExecutor(n_workers) as pool:
        running: deque[Future[list[Tokenised]]] = deque()
        for batch in _batches(pieces):
            running.append(pool.submit(work, batch))
            if len(running) > 4 * n_workers:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group small pieces, so that each task of a thread is worth its overhead."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE // 2 or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    yield batch


# --- tokens to shards ------------------------------------------------------------------------


@dataclass
class Progress:
    """The shards on disk, how many pieces of the corpus they hold, and by split the documents and their UTF-8 bytes."""

    pieces: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: list[Shard] = field(default_factory=list)
    rounds: int = 0

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Where a killed preparation stopped; the beginning if its files are missing or damaged."""
        try:
            fields = json.loads((folder / PROGRESS).read_bytes())
            fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
            fields["documents"]  # version 0.1.0 did not count them
            if all((folder / shard.file).stat().st_size == shard.bytes for shard in fields["shards"]):
                return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return cls()

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def __str__(self) -> str:
        shares = {split: self.text_bytes[split] / sum(self.text_bytes.values()) for split in SPLITS}
        return "; ".join(
            f"{split} {counted(self.documents[split], 'document')}, {self.text_bytes[split]:,} bytes "
            f"({shares[split]:.1%}), {self.tokens(split):,} tokens"
            for split in SPLITS
        )


def write_shards(
    folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, shard_tokens: int, text_bytes: int | None
) -> Progress:
    """Write the shards of the corpus that are not on disk yet."""
    writer = _Writer(folder, shard_tokens)
    rest = islice(pieces, writer.progress.pieces, None)
    with progress_bar("tokenising", text_bytes, sum(writer.progress.text_bytes.values())) as advance:
        for tokenised in _tokenise(rest, tokenizer):
            writer.add(tokenised)
            advance(tokenised.n_bytes)
        writer.write_round()
    return writer.progress


class _Writer:
    """Collects tokens and writes them in rounds: one shard per split, of complete pieces."""

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.progress = Progress.load(folder)
        self.collected: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.sizes = dict.fromkeys(SPLITS, 0)

    def add(self, tokenised: Tokenised) -> None:
        split, tokens, size, ends = tokenised
        if self.sizes[split] and self.sizes[split] + len(tokens) > self.shard_tokens:
            self.write_round()
        self.collected[split].append(tokens)
        self.sizes[split] += len(tokens)
        self.progress.text_bytes[split] += size
        self.progress.documents[split] += ends
        self.progress.pieces += 1

    def write_round(self) -> None:
        for split in SPLITS:
            if self.sizes[split]:
                path = self.folder / f"{split}_{self.progress.rounds:06d}.bin"
                write_shard(path, np.concatenate(self.collected[split]))
                self.progress.shards.append(describe_shard(path, split))
                self.collected[split], self.sizes[split] = [], 0
        self.progress.rounds += 1
        write_whole(self.folder / PROGRESS, json.dumps(asdict(self.progress)).encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One preparation of a folder at a time: a second one waits. The lock of a dead process is released."""
    with (folder / LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks: two processes would write the same bytes
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def progress_bar(what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar by a number of bytes; nothing is shown outside a terminal."""
    console = Console(stderr=True)
    columns = (
        *(progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn()),
        *(progress.TransferSpeedColumn(), progress.TimeRemainingColumn()),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda n_bytes: bar.advance(task, n_bytes)
