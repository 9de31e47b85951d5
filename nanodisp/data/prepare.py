"""Text to shards: what a dataset's `prepare.py` is made of, and the way to call one.

A corpus (see `documents.py`) is tokenised over all cores and written as shards with a manifest,
into a folder whose name tells its content: the same text, tokenizer and settings find it
again, anything else gets a folder of its own. An end-of-text token closes each document.

Shards are written in rounds: when the shard of one split is full, both splits' are written,
and then `progress.json`, which says how many pieces of the corpus the shards hold. So a
killed preparation skips these pieces and ends with the bytes of one that was never killed.
Memory is bounded by two shards, whatever the corpus. The manifest comes last.
"""

from __future__ import annotations

import fcntl
import importlib.util
import inspect
import json
import os
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
DATA, CONF = REPOSITORY / "data", REPOSITORY / "conf" / "data"  # in a clone
LOCK = ".lock"


@dataclass
class DataConfig:
    """Which data, and how it becomes shards.

    name: a folder of `data/` with a `prepare.py`; "shards" reads those in `path` as they lie.
    path: the file or folder of text ("text"), or of shards ("shards").
    tokenizer: "byte", "gpt2" or the path of a `.tiktoken` file. For "shards" without a
        manifest: what they were made with, "none" for tokens whose text nobody needs.
    val_fraction: share of the text that is for validation, up to a half: the end of a
        corpus that is one text file, else every k-th document, k = round(1 / val_fraction).
    field: the key of jsonl, or the column of parquet, that holds the text.
    shard_tokens: most tokens of a shard.
    chunks: how many training shards to download ("fineweb10B").
    folder: where prepared folders go; null for `data/<name>`.
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
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie in (0, 0.5]")
        if not 1 <= self.shard_tokens <= MAX_TOKENS:
            raise ValueError(f"data.shard_tokens={self.shard_tokens} must lie in 1 to {MAX_TOKENS}")
        if self.chunks < 1:
            raise ValueError(f"data.chunks={self.chunks} must be at least 1")
        if not self.tokenizer:
            raise ValueError("data.tokenizer is empty; choose byte, gpt2 or the path of a .tiktoken file")


# --- the doors: from train.py, from a dataset's script, from the command line --------------


def prepare(config: DataConfig) -> Path:
    """The folder of the shards that `config` asks for, prepared now unless it is there already.

    Raises:
        UserError: unknown dataset, or whatever its script finds wrong.
    """
    if config.name == "shards":
        if config.path is None or not Path(config.path).is_dir():
            raise UserError(f"data=shards needs the folder of the shards, data.path={config.path} is none")
        return Path(config.path)
    values = [file.stem for file in CONF.glob("*.yaml")]  # others are not to train on
    scripts = {name: script for name in values if (script := DATA / name / "prepare.py").is_file()}
    if config.name not in scripts:
        raise UserError(f"data.name={config.name} is unknown; choose one of {', '.join(sorted(scripts))}, shards")
    spec = importlib.util.spec_from_file_location(f"prepare_{config.name}", scripts[config.name])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.prepare(config)


def main(prepare_function: Callable[[DataConfig], Path]) -> None:
    """The command line of a dataset's script: `python data/text/prepare.py path=… tokenizer=gpt2`.

    The values of `conf/data/<name>.yaml` hold where the command line says nothing, so that
    training with `data=<name>` finds what was prepared here.
    """
    script = Path(inspect.getfile(prepare_function)).resolve()
    name = script.parent.name

    def run(given: Sequence[str]) -> None:
        values = OmegaConf.load(CONF / f"{name}.yaml")
        known = cast(dict, OmegaConf.to_container(values)).items()
        defaults = [f"{key}={value}" for key, value in known if value != cli.MISSING]
        folder = prepare_function(cli.parse(DataConfig, [f"folder={script.parent}", *defaults, *given]))
        print(folder)
        for split in SPLITS:
            tokens = open_split(folder, split)
            print(f"{split}: {len(tokens):,} tokens, shards: {len(tokens.paths)}")

    cli.run(run)


def prepare_files(config: DataConfig, files: Sequence[Path], root: Path, stem: str) -> Path:
    """Prepare a corpus of files, known by their names below `root` and their content."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda file: digest(file, "blake2b"), files)
        content = [f"{file.relative_to(root).as_posix()} {digest}" for file, digest in zip(files, digests, strict=True)]
    plain_bytes = sum(file.stat().st_size for file in files) if all(map(is_text, files)) else None
    pieces = read_files(files, config.field, config.val_fraction)
    return prepare_pieces(config, pieces, stem, "\n".join(content), source=stem, text_bytes=plain_bytes)


def prepare_documents(config: DataConfig, documents: Iterable[str], stem: str, source: str) -> Path:
    """Prepare a stream of documents that `source` identifies; not a document is asked for if it is done already."""
    parts = (part for document in documents for part in cut(document))
    return prepare_pieces(config, every_kth_to_val(parts, config.val_fraction), stem, source, source)


def prepare_pieces(
    config: DataConfig, pieces: Iterable[Piece], stem: str, content: str, source: str, text_bytes: int | None = None
) -> Path:
    """Prepare a stream of pieces, unless it is done already, and return the folder.

    Args:
        pieces: the same in every call with the same content.
        stem: how the folder's name begins.
        content: what makes this corpus differ from any other, hashed into the folder's name.
        source: where the text is from, for the manifest.
        text_bytes: of the whole corpus, if known, for the progress bar.

    Raises:
        UserError: no text for one of the splits, or trouble with reading, tokenizer or disk.
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
            f"{folder} cannot be written ({error.strerror}); set data.folder to a place that can"
        ) from error
    with _alone_in(folder):
        if not (folder / MANIFEST).exists():  # whoever we waited for may have done it
            print(f"preparing {folder}, this once", file=sys.stderr)
            for stale in folder.glob(".*.tmp"):
                stale.unlink()
            progress = _write_shards(folder, pieces, tokenizer, config.shard_tokens, text_bytes)
            _write_manifest(folder, progress, tokenizer, config.tokenizer, source)
    return folder


def _identity(tokenizer: str) -> str:
    """What tells a tokenizer from another: its spec, or the content of its file."""
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
            raise UserError(f"{source} has too little text: none is left for {split}; add documents or characters")
        ratios[split] = progress.text_bytes[split] / n_tokens
    if spec.endswith(".tiktoken"):  # a copy makes the folder complete in itself
        write_whole(folder / Path(spec).name, Path(spec).read_bytes())
        spec = Path(spec).name
    Manifest(spec, tokenizer.vocab_size, source, ratios, progress.shards).save(folder)
    (folder / PROGRESS).unlink()


# --- pieces to tokens, over all cores --------------------------------------------------------


class Tokenised(NamedTuple):
    """A piece's tokens, end-of-text included where the document ends, and the UTF-8 bytes of its text."""

    split: str
    tokens: np.ndarray
    n_bytes: int


def _tokenise(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Tokenised]:
    """In the order of the pieces. tiktoken lets go of the GIL, so threads are enough."""
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
    """Small pieces together, so that a thread has something to do."""
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
    """What the shards on disk hold: so many pieces of the corpus, and the bytes of their text by split."""

    pieces: int = 0
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: list[Shard] = field(default_factory=list)
    rounds: int = 0

    @classmethod
    def load(cls, folder: Path) -> _Progress:
        """Where a killed preparation stopped; the very beginning if it left nothing whole."""
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
    """Write what is still missing of the corpus's shards."""
    writer = _Writer(folder, shard_tokens)
    rest = islice(pieces, writer.progress.pieces, None)
    with _progress_bar(text_bytes, sum(writer.progress.text_bytes.values())) as advance:
        for tokenised in _tokenise(rest, tokenizer):
            writer.add(tokenised)
            advance(tokenised.n_bytes)
        writer.write_round()
    return writer.progress


class _Writer:
    """Gathers tokens and writes them in rounds, a shard of each split, that hold whole pieces."""

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.progress = _Progress.load(folder)
        self.gathered: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.sizes = dict.fromkeys(SPLITS, 0)

    def add(self, tokenised: Tokenised) -> None:
        split, tokens, n_bytes = tokenised
        if self.sizes[split] and self.sizes[split] + len(tokens) > self.shard_tokens:
            self.write_round()
        self.gathered[split].append(tokens)
        self.sizes[split] += len(tokens)
        self.progress.text_bytes[split] += n_bytes
        self.progress.pieces += 1

    def write_round(self) -> None:
        for split in SPLITS:
            if self.sizes[split]:
                path = self.folder / f"{split}_{self.progress.rounds:06d}.bin"
                write_shard(path, np.concatenate(self.gathered[split]))
                self.progress.shards.append(describe_shard(path, split))
                self.gathered[split], self.sizes[split] = [], 0
        self.progress.rounds += 1
        write_whole(self.folder / PROGRESS, json.dumps(asdict(self.progress)).encode())


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One preparation of a folder at a time: a second one waits. A dead process holds no lock."""
    with (folder / LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks: two would write the same bytes
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress_bar(total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with each further number of bytes; shows nothing outside of a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenising", total=total, completed=done)
        yield lambda n_bytes: bar.advance(task, n_bytes)
