"""Text to shards: the building blocks of a data set's `prepare.py`, and `prepare`, which runs it.

A corpus (see `documents.py`) is tokenised on all cores and written as shards with a manifest,
into a folder named by a hash of its content: the same text, tokenizer and settings find it
again, anything else gets a folder of its own. An end-of-text token ends each document.
Files are read twice: first to check them and to decide the split, before anything is written.
The manifest is written last.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for Ctrl-C while the rest is loaded

# isort: split
import codecs
import inspect
import json
import os
import runpy
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from nanodisp import cli
from nanodisp.cli import LEAVE, Unused, one_of
from nanodisp.data.decode import Tally
from nanodisp.data.documents import Piece, Skipped, counted, cut, describe, is_text, read_as, read_documents
from nanodisp.data.shards import MANIFEST, MAX_TOKENS, PROGRESS, SPLITS, Manifest, open_split
from nanodisp.data.split import Split, assign, every_kth_is, n_bytes, split_by_size, split_stream
from nanodisp.data.tokenizer import SPECS, Tokenizer, copy_tokenizer, identity, label, load_tokenizer
from nanodisp.data.writer import LOCK, Progress, locked, progress_bar, write_shards
from nanodisp.errors import UserError
from nanodisp.files import digest, write_whole

REPOSITORY = Path(__file__).resolve().parents[2]
DATA, CONF = REPOSITORY / "data", REPOSITORY / "conf" / "data"  # only a clone has them, an installed wheel does not
SPLIT = "split.json"  # the rule that split a collection of files; folders of version 0.1.0 have none


@dataclass
class DataConfig:
    """The data set, and how it is turned into shards.

    name: a folder of `data/` with a `prepare.py`; "shards" reads the shards in `path` directly.
    path: the file or folder of text ("text"), or the folder of shards ("shards").
    tokenizer: "byte", "gpt2", or the path of a `.tiktoken` file or of a Hugging Face folder with
        a tokenizer.json. For "shards" without a manifest: the tokenizer they were made with, or
        "none" if their text is not needed.
    val_fraction: share of the text held out for validation, at most a half: the end of a
        single text file, otherwise every k-th document, k = round(1 / val_fraction), or parts
        of documents where these are too few or too unequal. File names decide before it ("text").
    field: the key of jsonl, or the column of parquet, that holds the text.
    encoding: of text and jsonl files that do not begin with a byte order mark.
    shard_tokens: maximum number of tokens per shard.
    chunks: number of training shards to download ("fineweb10B").
    folder: where prepared folders are created; null for `data/<name>`.
    """

    name: str = "pystdlib"
    path: str | None = None
    tokenizer: str = "byte"
    val_fraction: float = 0.05
    field: str = "text"
    encoding: str = "utf-8"
    shard_tokens: int = 100_000_000
    chunks: int = 10
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None and not self.path.strip():
            raise ValueError("data.path is empty; give data=text data.path=<file or folder>")
        if not 0 < self.val_fraction <= 0.5:
            raise ValueError(f"data.val_fraction={self.val_fraction} must be in (0, 0.5]")
        if not 1 <= self.shard_tokens <= MAX_TOKENS:
            raise ValueError(f"data.shard_tokens={self.shard_tokens} must be in 1 to {MAX_TOKENS}")
        if self.chunks < 1:
            raise ValueError(f"data.chunks={self.chunks} must be at least 1")
        if not self.tokenizer:
            raise ValueError(f"data.tokenizer is empty; choose {SPECS}")
        try:
            "".encode(self.encoding)
            name = codecs.lookup(self.encoding).name  # one name for utf8, UTF-8, …
        except (LookupError, ValueError) as error:
            raise ValueError(f"data.encoding={self.encoding} is unknown; utf-8 and cp1252 are examples") from error
        self.encoding = "utf-8" if name == "utf-8-sig" else name


# --- entry points: for train.py, for a data set's script, for the command line -------------


OF_WIKITEXT = ("wikitext103", "wikitext103_lines")
PUBLISHED = ("pystdlib", "shakespeare", *OF_WIKITEXT, "fineweb_edu", "openwebtext")  # and fineweb10B
UTF8 = ("shards", "english", *PUBLISHED, "fineweb10B")
# Names of data sets: those that are known not to use the key. A new data set may use all.
OF_DATA_SETS = [
    Unused(("data.path",), "data.name", one_of(*PUBLISHED, "fineweb10B"), "add data=text, or data=shards for shards"),
    Unused(("data.tokenizer",), "data.name", one_of("fineweb10B"), f"its shards hold GPT-2's tokens; {LEAVE}"),
    Unused(("data.val_fraction",), "data.name", one_of("shards", *OF_WIKITEXT, "fineweb10B"), f"it is split; {LEAVE}"),
    Unused(("data.encoding",), "data.name", one_of(*UTF8), f"it is UTF-8; {LEAVE}"),
    Unused(("data.field",), "data.name", one_of("pystdlib", "shakespeare", "shards", "fineweb10B"), LEAVE),
    Unused(("data.shard_tokens",), "data.name", one_of("shards", "fineweb10B"), f"its shards exist; {LEAVE}"),
    Unused(("data.chunks",), "data.name", one_of("text", "shards", "english", *PUBLISHED), "add data=fineweb10B"),
    Unused(("data.folder",), "data.name", one_of("shards"), f"nothing is prepared; {LEAVE}"),
]


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
        # CONF, unless a wheel is imported
        values = OmegaConf.load(script.parents[2] / "conf" / "data" / f"{name}.yaml")
        defaults = {"folder": script.parent, **cast(dict, OmegaConf.to_container(values))}
        typed = [argument.partition("=")[0] for argument in given]
        others = [f"{key}={value}" for key, value in defaults.items() if value != cli.MISSING and key not in typed]
        config = cli.parse(DataConfig, [*others, *given])
        for argument, key in zip(given, typed, strict=True):
            if rule := next((r for r in OF_DATA_SETS if f"data.{key}" in r.keys and r.when(name)), None):
                raise UserError(f"{argument} has no effect on data={name}: {rule.advice}")
        folder = prepare_function(config)
        print(folder)
        for split in SPLITS:
            tokens = open_split(folder, split)
            print(f"{split}: {len(tokens):,} tokens, shards: {len(tokens.paths)}")

    cli.run(run, DataConfig)


def prepare_files(
    config: DataConfig,
    files: Sequence[Path],
    root: Path,
    stem: str,
    splits: Mapping[Path, str] | None = None,
    skipped: Sequence[Skipped] = (),
) -> Path:
    """Prepare a corpus of files, identified by their names below `root` and their content.

    Args:
        splits: "train" or "val" for each file; None to hold out `val_fraction` of the text.
        skipped: what else was found, to be reported.
    """
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(files, pool.map(lambda file: digest(file, "blake2b"), files), strict=True))
        content = "\n".join(f"{f.relative_to(root).as_posix()} {d}{read_as(f)}" for f, d in digests.items())
    if os.environ.get("RANK", "0") == "0":
        _warn_of_same_text(digests, splits or {})
    # Known without reading: the folder, if it is complete, and made or checked by `_survey`.
    for key in ("by name",) if splits else (None, "by size"):
        folder = _folder(config, stem, content, key)
        if (folder / MANIFEST).exists() and (folder / SPLIT).exists():
            if skipped and os.environ.get("RANK", "0") == "0":
                print(f"{folder}: skipped {describe(skipped)}", file=sys.stderr)
            return folder
    tally = Tally()
    sizes, split = _survey(config, files, splits, tally)
    for name, n in (("train", sum(split.n_train)), ("val", sum(sizes) - sum(split.n_train))):
        if not n:
            raise _too_little(stem, name, [*tally.notes(), *_skipped(skipped)])
    documents = (d for file in files for d in read_documents(file, config.field, config.encoding, Tally()))
    folder = _folder(config, stem, content, split.key)
    summary = [f"{counted(len(files), 'file')}, {split.rule}", *tally.notes(), *_skipped(skipped)]
    rule = json.dumps({"rule": split.rule, "files": len(files), "documents": len(sizes)}).encode()
    if (folder / MANIFEST).exists():  # made by version 0.1.0, and what it should be
        with suppress(UserError):
            write_whole(folder / SPLIT, rule)
        return folder
    return _prepare(config, folder, assign(documents, sizes, split.n_train), stem, sum(sizes), summary, rule)


def _warn_of_same_text(digests: Mapping[Path, str], splits: Mapping[Path, str]) -> None:
    train = {digests[file]: file for file, split in splits.items() if split == "train" and file.stat().st_size}
    same = [file for file, split in splits.items() if split == "val" and digests[file] in train]
    if same:
        files = f"{train[digests[same[0]]]} and {same[0]}{f', and {len(same) - 1:,} more' if same[1:] else ''}"
        print(f"warning: the same text is for training and for validation: {files}", file=sys.stderr)


def _skipped(skipped: Sequence[Skipped]) -> list[str]:
    return [f"skipped {describe(skipped)}"] if skipped else []


def _survey(
    config: DataConfig, files: Sequence[Path], splits: Mapping[Path, str] | None, tally: Tally
) -> tuple[array[int], Split]:
    """The size of each document of the files, and their split. Raises UserError for what cannot be read."""
    sizes, n_train = array("q"), array("q")
    with progress_bar("reading", None) as advance:
        for file in files:
            for chunks in read_documents(file, config.field, config.encoding, tally):
                sizes.append(sum(map(n_bytes, chunks)))
                n_train.append(sizes[-1] if splits and splits[file] == "train" else 0)
                advance(sizes[-1])
    if splits:
        n = sum(split == "val" for split in splits.values())
        return sizes, Split(f"{n:,} of them for validation by name", "by name", n_train)
    split = split_by_size(sizes, config.val_fraction)
    if len(files) == 1 and is_text(files[0]) and not tally.undecodable:
        split = split._replace(rule="its end for validation", key=None)  # in every version
    return sizes, split


def prepare_documents(config: DataConfig, documents: Iterable[str], stem: str, source: str) -> Path:
    """Prepare a stream of documents, identified by `source`; if it is prepared already, none is requested."""
    parts = (part for document in documents for part in cut(document))
    key = None if every_kth_is(config.val_fraction) else "by share"
    return prepare_pieces(config, split_stream(parts, config.val_fraction), stem, source, key)


def prepare_pieces(
    config: DataConfig, pieces: Iterable[Piece], stem: str, source: str, split: str | None = None
) -> Path:
    """Prepare a stream of pieces, unless it is prepared already, and return the folder.

    Args:
        pieces: the same in every call with the same `source`.
        stem: the beginning of the folder's name.
        source: where the text is from; identifies the corpus.
        split: see `_folder`.

    Raises:
        UserError: no text for one of the splits, or the corpus, the tokenizer or the disk fails.
    """
    folder = _folder(config, stem, source, split)
    return folder if (folder / MANIFEST).exists() else _prepare(config, folder, pieces, source)


def _folder(config: DataConfig, stem: str, content: str, split: str | None) -> Path:
    """The folder for a corpus with this content, split by another rule than every k-th document if `split` is given."""
    settings = [content, identity(config.tokenizer), config.val_fraction, config.field, config.shard_tokens]
    settings += [config.encoding] if config.encoding != "utf-8" else []
    settings += [split] if split else []
    key = blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
    return Path(config.folder or DATA / config.name) / f"{stem}-{label(config.tokenizer)}-{key}"


def _prepare(
    config: DataConfig,
    folder: Path,
    pieces: Iterable[Piece],
    source: str,
    text_bytes: int | None = None,
    summary: Sequence[str] = (),
    rule: bytes | None = None,
) -> Path:
    """Write the folder; report what it holds, and `summary`. `rule` is the content of split.json."""
    tokenizer = load_tokenizer(config.tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); set data.folder to a writable folder"
        ) from error
    with locked(folder):
        folder.mkdir(exist_ok=True)  # another process may have failed while we waited, and removed it
        if (folder / MANIFEST).exists():  # or prepared it
            return folder
        print(f"preparing {folder} (only the first time)", file=sys.stderr)
        for stale in folder.glob(".*.tmp"):
            stale.unlink()
        try:
            progress = write_shards(folder, pieces, tokenizer, config.shard_tokens, text_bytes)
        except UserError:
            if not (folder / PROGRESS).exists():  # nothing to resume from
                shutil.rmtree(folder)
            raise
        if rule is not None:
            write_whole(folder / SPLIT, rule)
        _write_manifest(folder, progress, tokenizer, config.tokenizer, source)
        print("; ".join([f"{folder}: {progress}", *summary]), file=sys.stderr)
    return folder


def _too_little(source: str, split: str, notes: Sequence[str] = ()) -> UserError:
    because = "".join(f"; {note}" for note in notes)
    return UserError(f"{source} has too little text: {split} would be empty; add documents or characters{because}")


def _write_manifest(folder: Path, progress: Progress, tokenizer: Tokenizer, spec: str, source: str) -> None:
    ratios = {}
    for split in SPLITS:
        n_tokens = progress.tokens(split)
        if not n_tokens:
            shutil.rmtree(folder)
            raise _too_little(source, split)
        ratios[split] = progress.text_bytes[split] / n_tokens
    spec = copy_tokenizer(spec, folder)  # a copy makes the folder self-contained
    Manifest(spec, tokenizer.vocab_size, source, ratios, progress.shards).save(folder)
    (folder / PROGRESS).unlink()
