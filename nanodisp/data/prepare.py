"""Text to shards: the building blocks of a data set's `prepare.py`, and `prepare`, which runs it.

A corpus (see `documents.py`) is tokenised on all cores and written as shards with a manifest,
into a folder named by a hash of its content: the same text, tokenizer and settings find it
again, anything else gets a folder of its own. An end-of-text token ends each document.

Shards are written in rounds: when the shard of one split is full, those of both splits are
written, and then `progress.json`, which records how many pieces of the corpus they hold. A
killed preparation skips these pieces when run again and ends with the same bytes as an
uninterrupted one. Memory is bounded by two shards for any corpus. The manifest is written last.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import runpy
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nanodisp import cli
from nanodisp.data.documents import PIECE, Piece, cut, every_kth_to_val, is_text, read_files
from nanodisp.data.shards import (
    MANIFEST,
    MAX_TOKENS,
    PROGRESS,
    SPLITS,
    Manifest,
    Shard,
    describe_shard,
    open_split,
    write_shard,
)
from nanodisp.data.tokenizer import Tokenizer, load_tokenizer
from nanodisp.errors import UserError
from nanodisp.files import digest, write_whole

REPOSITORY = Path(__file__).resolve().parents[2]
DATA, CONF = REPOSITORY / "data", REPOSITORY / "conf" / "data"  # only a clone has them, an installed wheel does not
LOCK = ".lock"


@dataclass
class DataConfig:
    """The data set, and how it is turned into shards.

    name: a folder of `data/` with a `prepare.py`; "shards" reads the shards in `path` directly.
    path: the file or folder of text ("text"), or the folder of shards ("shards").
    tokenizer: "byte", "gpt2" or the path of a `.tiktoken` file. For "shards" without a
        manifest: the tokenizer they were made with, or "none" if their text is not needed.
    val_fraction: share of the text held out for validation, at most a half: the end of a
        single text file, otherwise every k-th document, k = round(1 / val_fraction).
    field: the key of jsonl, or the column of parquet, that holds the text.
    shard_tokens: maximum number of tokens per shard.
    chunks: number of training shards to download ("fineweb10B").
    folder: where prepared folders are created; null for `data/<name>`.
    """

    name: str = "pystdlib"
    path: str | None = None
    tokenizer: str = "byte"
    val_fraction: float = 0.05
    field: str = "text"
    shard_tokens: int = 100_000_000
    chunks: int = 10
    folder: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction <= 0.5:
            raise ValueError(f"data.val_fraction={self.val_fraction} must be in (0, 0.5]")
        if not 1 <= self.shard_tokens <= MAX_TOKENS:
            raise ValueError(f"data.shard_tokens={self.shard_tokens} must be in 1 to {MAX_TOKENS}")
        if self.chunks < 1:
            raise ValueError(f"data.chunks={self.chunks} must be at least 1")
        if not self.tokenizer:
            raise ValueError("data.tokenizer is empty; choose byte, gpt2 or the path of a .tiktoken file")


# --- entry points: for train.py, for a data set's script, for the command line -------------


def prepare(config: DataConfig) -> Path:
    """The folder of shards that `config` selects, prepared first if necessary.

    Raises:
        UserError: unknown data set, or any error that its script reports.
    """
    if config.name == "shards":
        if config.path is None or not Path(config.path).is_dir():
            raise UserError(f"data=shards needs a folder of shards, and data.path={config.path} is not a folder")
        return Path(config.path)
    names = [file.stem for file in CONF.glob("*.yaml")]  # a script without one is not for training: hellaswag
    scripts = {name: script for name in names if (script := DATA / name / "prepare.py").is_file()}
    if not scripts:
        raise UserError(
            f"data.name={config.name} needs data/ and conf/ of a clone of nanodisp's repository, which an installed "
            "package lacks; use a clone, or give shards (data=shards data.path=<folder>; data=<folder> or text=<file> "
            "for nanodisp.condensation)"
        )
    if config.name not in scripts:
        raise UserError(f"data.name={config.name} is unknown; choose one of {', '.join(sorted(scripts))}, shards")
    return runpy.run_path(str(scripts[config.name]), run_name=f"prepare_{config.name}")["prepare"](config)


def main(prepare_function: Callable[[DataConfig], Path]) -> None:
    """The command line of a data set's script: `python data/text/prepare.py path=… tokenizer=gpt2`.

    Defaults come from `conf/data/<name>.yaml`, so that training with `data=<name>` finds the
    shards prepared here.
    """
    script = Path(inspect.getfile(prepare_function)).resolve()
    name = script.parent.name

    def run(given: Sequence[str]) -> None:
        values = OmegaConf.load(
            script.parents[2] / "conf" / "data" / f"{name}.yaml"
        )  # CONF, unless a wheel is imported
        known = cast(dict, OmegaConf.to_container(values)).items()
        defaults = [f"{key}={value}" for key, value in known if value != cli.MISSING]
        folder = prepare_function(cli.parse(DataConfig, [f"folder={script.parent}", *defaults, *given]))
        print(folder)
        for split in SPLITS:
            tokens = open_split(folder, split)
            print(f"{split}: {len(tokens):,} tokens, shards: {len(tokens.paths)}")

    cli.run(run)


def prepare_files(config: DataConfig, files: Sequence[Path], root: Path, stem: str) -> Path:
    """Prepare a corpus of files, identified by their names below `root` and their content."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda file: digest(file, "blake2b"), files)
        content = [f"{file.relative_to(root).as_posix()} {digest}" for file, digest in zip(files, digests, strict=True)]
    plain_bytes = sum(file.stat().st_size for file in files) if all(map(is_text, files)) else None
    pieces = read_files(files, config.field, config.val_fraction)
    return prepare_pieces(config, pieces, stem, "\n".join(content), source=stem, text_bytes=plain_bytes)


def prepare_documents(config: DataConfig, documents: Iterable[str], stem: str, source: str) -> Path:
    """Prepare a stream of documents, identified by `source`; if it is prepared already, none is requested."""
    parts = (part for document in documents for part in cut(document))
    return prepare_pieces(config, every_kth_to_val(parts, config.val_fraction), stem, source, source)


def prepare_pieces(
    config: DataConfig, pieces: Iterable[Piece], stem: str, content: str, source: str, text_bytes: int | None = None
) -> Path:
    """Prepare a stream of pieces, unless it is prepared already, and return the folder.

    Args:
        pieces: the same in every call with the same `content`.
        stem: the beginning of the folder's name.
        content: identifies the corpus; hashed into the folder's name.
        source: where the text is from, for the manifest.
        text_bytes: size of the corpus, if known, for the progress bar.

    Raises:
        UserError: no text for one of the splits, or the corpus, the tokenizer or the disk fails.
    """
    settings = [content, _identity(config.tokenizer), config.val_fraction, config.field, config.shard_tokens]
    key = blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
    folder = Path(config.folder or DATA / config.name) / f"{stem}-{Path(config.tokenizer).stem}-{key}"
    if (folder / MANIFEST).exists():
        return folder
    tokenizer = load_tokenizer(config.tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); set data.folder to a writable folder"
        ) from error
    with _locked(folder):
        if not (folder / MANIFEST).exists():  # another process may have done it while we waited
            print(f"preparing {folder} (only the first time)", file=sys.stderr)
            for stale in folder.glob(".*.tmp"):
                stale.unlink()
            progress = _write_shards(folder, pieces, tokenizer, config.shard_tokens, text_bytes)
            _write_manifest(folder, progress, tokenizer, config.tokenizer, source)
    return folder


def _identity(tokenizer: str) -> str:
    """Identifies a tokenizer: its spec, or the hash of its file."""
    if not tokenizer.endswith(".tiktoken"):
        return tokenizer
    try:
        return digest(Path(tokenizer), "blake2b")
    except OSError as error:
        raise UserError(f"data.tokenizer={tokenizer} cannot be read: {error.strerror}") from error


def _write_manifest(folder: Path, progress: _Progress, tokenizer: Tokenizer, spec: str, source: str) -> None:
    ratios = {}
    for split in SPLITS:
        n_tokens = sum(shard.tokens for shard in progress.shards if shard.split == split)
        if not n_tokens:
            raise UserError(f"{source} has too little text: {split} would be empty; add documents or characters")
        ratios[split] = progress.text_bytes[split] / n_tokens
    if spec.endswith(".tiktoken"):  # a copy makes the folder self-contained
        write_whole(folder / Path(spec).name, Path(spec).read_bytes())
        spec = Path(spec).name
    Manifest(spec, tokenizer.vocab_size, source, ratios, progress.shards).save(folder)
    (folder / PROGRESS).unlink()


# --- pieces to tokens, on all cores ----------------------------------------------------------


class Tokenised(NamedTuple):
    """The tokens of a piece, with end-of-text if the document ends, and the size of its text in UTF-8 bytes."""

    split: str
    tokens: np.ndarray
    n_bytes: int


def _tokenise(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Tokenised]:
    """Tokenise in the order of the pieces. tiktoken releases the GIL, so threads are enough."""
    nothing = tokenizer.encode("")
    end = np.append(nothing, tokenizer.eot).astype(nothing.dtype)

    def work(batch: list[Piece]) -> list[Tokenised]:
        done = []
        for split, text, ends in batch:
            tokens = tokenizer.encode(text)
            if ends and text:
                tokens = np.concatenate([tokens, end])
            done.append(Tokenised(split, tokens, len(text.encode("utf-8", "replace"))))
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
class _Progress:
    """The shards on disk, how many pieces of the corpus they hold, and the UTF-8 bytes of their text by split."""

    pieces: int = 0
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: list[Shard] = field(default_factory=list)
    rounds: int = 0

    @classmethod
    def load(cls, folder: Path) -> _Progress:
        """Where a killed preparation stopped; the beginning if its files are missing or damaged."""
        try:
            fields = json.loads((folder / PROGRESS).read_bytes())
            fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
            if all((folder / shard.file).stat().st_size == shard.bytes for shard in fields["shards"]):
                return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return cls()


def _write_shards(
    folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, shard_tokens: int, text_bytes: int | None
) -> _Progress:
    """Write the shards of the corpus that are not on disk yet."""
    writer = _Writer(folder, shard_tokens)
    rest = islice(pieces, writer.progress.pieces, None)
    with _progress_bar(text_bytes, sum(writer.progress.text_bytes.values())) as advance:
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
        self.progress = _Progress.load(folder)
        self.collected: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.sizes = dict.fromkeys(SPLITS, 0)

    def add(self, tokenised: Tokenised) -> None:
        split, tokens, n_bytes = tokenised
        if self.sizes[split] and self.sizes[split] + len(tokens) > self.shard_tokens:
            self.write_round()
        self.collected[split].append(tokens)
        self.sizes[split] += len(tokens)
        self.progress.text_bytes[split] += n_bytes
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
def _locked(folder: Path) -> Iterator[None]:
    """One preparation of a folder at a time: a second one waits. The lock of a dead process is released."""
    with (folder / LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks: two processes would write the same bytes
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress_bar(total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar by a number of bytes; nothing is shown outside a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenising", total=total, completed=done)
        yield lambda n_bytes: bar.advance(task, n_bytes)
