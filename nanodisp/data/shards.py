"""Tokens on disk: shard files, the manifest beside them, and a split read as one long array.

Shards are written in llm.c's layout: a header of 256 little-endian int32, of which the first three are magic, version
and token count, then the tokens, uint16 (magic 20240520, version 1) or uint32 (magic 20240801, version 7). Read, but
never written: nanoGPT's headerless `train.bin` and `val.bin` (uint16), and one-dimensional `.npy` files (uint16 or
uint32).

Checked at open, at no cost: header, sizes and the manifest. The range of the token ids is checked by
`Tokens.check_range` (the manifest's maxima, and both ends of each shard) and by `check_tokens` on the tokens about to
be used; every byte by `verify`. Files appear under their name only when they are complete and flushed to disk.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanodisp import cli
from nanodisp.errors import UserError
from nanodisp.files import digest, write_whole

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
# magic -> version, dtype
KINDS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
HEADERLESS = ("train.bin", "val.bin")  # nanoGPT's file names
QUESTIONS = 20240522  # llm.c's magic of the files that `questions.py` reads
MAX_TOKENS = 2**31 - 1  # per shard: the header's count is an int32

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # exists until a preparation is complete
FORMAT_VERSION = 1
ENDS = 1 << 20  # tokens that `check_range` reads at each end of a shard


# --- one shard ---------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write a shard with the dtype of the tokens, atomically.

    Args:
        tokens: uint16 or uint32 [1 to 2**31 - 1].

    Raises:
        ValueError: any other array. UserError: the file cannot be written (disk full).
    """
    magic, version = next(((m, v) for m, (v, dtype) in KINDS.items() if dtype == tokens.dtype), (0, 0))
    if not magic or tokens.ndim != 1 or not 1 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(f"a shard takes 1 to 2**31 - 1 tokens, uint16 or uint32, not {tokens.dtype} {tokens.shape}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = magic, version, len(tokens)
    write_whole(path, header.data, np.ascontiguousarray(tokens).data)


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard of any of the formats above, memory-mapped, uint16 or uint32 [n_tokens].

    Raises:
        UserError: missing, empty, truncated, too long, or not a shard.
    """
    try:
        n_bytes = path.stat().st_size
        if n_bytes == 0:
            raise UserError(f"shard {path} is empty; download or prepare it again")
        return _read_npy(path) if path.suffix == ".npy" else _read_bin(path, n_bytes)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"shard {path} cannot be read: {error}") from error


def _read_bin(path: Path, n_bytes: int) -> np.ndarray:
    with path.open("rb") as file:
        start = file.read(12)
    magic, version, n_tokens = np.frombuffer(start, "<i4").tolist() if len(start) == 12 else (0, 0, 0)
    if magic not in KINDS:
        if path.name in HEADERLESS:
            return _read_headerless(path, n_bytes)
        if magic == QUESTIONS:
            raise UserError(f"{path} holds questions for train.eval_task, not tokens: move it to another folder")
        raise UserError(
            f"shard {path} begins with {magic}, not with the magic number {' or '.join(map(str, KINDS))}; "
            f"files without a header must be named {' or '.join(HEADERLESS)}"
        )
    known_version, dtype = KINDS[magic]
    if version != known_version:
        raise UserError(f"shard {path} has version {version}; magic {magic} requires version {known_version}")
    if n_tokens < 1:
        raise UserError(f"shard {path} has {n_tokens} tokens in its header, but needs at least one; prepare it again")
    expected = HEADER_BYTES + n_tokens * dtype.itemsize
    if n_bytes != expected:
        trouble = "truncated" if n_bytes < expected else "too long"
        raise UserError(
            f"shard {path} is {trouble}: its header says {n_tokens} tokens in {expected} bytes, "
            f"the file has {n_bytes}; download or prepare it again"
        )
    return np.asarray(np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,)))


def _read_headerless(path: Path, n_bytes: int) -> np.ndarray:
    # Tokens of GPT-2 are never mistaken for a header: as uint16, both magic numbers begin with an id above 50,256.
    if n_bytes % 2:
        raise UserError(
            f"shard {path} has no header and an odd size of {n_bytes} bytes, so it is not uint16 tokens; copy it again"
        )
    return np.asarray(np.memmap(path, "<u2", mode="r"))


def _read_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises several types for a damaged header
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"shard {path} is not a complete .npy file: {reason}; download or create it again") from error
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype not in ("<u2", "<u4") or not len(tokens):
        found = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive"
        raise UserError(f"shard {path} holds {found}; it must be uint16 or uint32 of one dimension, not empty")
    if tokens.offset + tokens.nbytes != path.stat().st_size:  # a damaged header would shift every token
        raise UserError(f"shard {path} is longer than its {len(tokens)} tokens need; download or create it again")
    return np.asarray(tokens)


def check_tokens(tokens: np.ndarray, vocab_size: int, where: object) -> None:
    """Raise UserError, naming `where`, if a token's id does not fit the vocabulary."""
    highest = int(tokens.max(initial=0))
    if highest >= vocab_size:
        raise UserError(
            f"{where} holds token {highest}, but the vocabulary ends at {vocab_size - 1}; "
            "the shards were made with another tokenizer (data.tokenizer, model.vocab_size) or are damaged"
        )


# --- the manifest --------------------------------------------------------------------------


@dataclass
class Shard:
    """The manifest's entry for one shard file. `bytes` and `sha256` are those of the file, header included."""

    file: str
    split: str
    tokens: int
    bytes: int
    sha256: str
    max_token: int

    def __post_init__(self) -> None:
        # The manifest may come from an untrusted source: the name must not lead out of the folder.
        if not isinstance(self.file, str) or not self.file or Path(self.file).name != self.file:
            raise ValueError(f"shard file {self.file!r} is not a plain file name")
        if self.split not in SPLITS:
            raise ValueError(f"the split of {self.file} is {self.split!r}, neither train nor val")
        for key, lowest in (("tokens", 1), ("bytes", 1), ("max_token", 0)):
            if type(getattr(self, key)) is not int or getattr(self, key) < lowest:
                raise ValueError(f"{key} of {self.file} is {getattr(self, key)!r}, not an integer of at least {lowest}")
        if not isinstance(self.sha256, str) or len(self.sha256) != 64:
            raise ValueError(f"sha256 of {self.file} is not 64 hex digits")


def describe_shard(path: Path, split: str) -> Shard:
    """The manifest's entry for a shard on disk; reads the file twice."""
    tokens = read_shard(path)
    return Shard(path.name, split, len(tokens), path.stat().st_size, digest(path), int(tokens.max()))


@dataclass
class Manifest:
    """The contents of a folder of shards. It is written last: a folder with a manifest is complete.

    tokenizer: a spec for `load_tokenizer`; a `.tiktoken` file is beside the shards.
    vocab_size: every token id is below it.
    source: where the text is from.
    bytes_per_token: split -> UTF-8 bytes of its text per token, end-of-text tokens included;
        converts nats per token to bits per byte. Empty if unknown.
    shards: in reading order.
    """

    tokenizer: str
    vocab_size: int
    source: str
    bytes_per_token: dict[str, float]
    shards: list[Shard]
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.version != FORMAT_VERSION:
            raise ValueError(f"its format version is {self.version!r}; this nanodisp reads version {FORMAT_VERSION}")
        if not isinstance(self.tokenizer, str) or not self.tokenizer or Path(self.tokenizer).name != self.tokenizer:
            raise ValueError(f"its tokenizer is {self.tokenizer!r}, not a name or a file beside it")
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= 2**32:
            raise ValueError(f"its vocab_size is {self.vocab_size!r}, not an integer from 1 to 2**32")
        if not isinstance(self.source, str):
            raise ValueError(f"its source is {self.source!r}, not a string")
        for split, ratio in self.bytes_per_token.items():
            if split not in SPLITS or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
                raise ValueError(f"its bytes_per_token has {split}: {ratio!r}, not a positive number for train or val")
        for shard in self.shards:
            if shard.max_token >= self.vocab_size:
                raise ValueError(f"{shard.file} holds token {shard.max_token}, its vocab_size is {self.vocab_size}")

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into the folder, atomically."""
        write_whole(folder / MANIFEST, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the folder's manifest. Raises UserError if it is missing or not valid."""
        path = folder / MANIFEST
        try:
            fields = json.loads(path.read_bytes())
            fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
            return cls(**fields)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a valid manifest: {error}; prepare the folder again") from error


# --- a split: one long array over its shards -------------------------------------------------


class Tokens:
    """The tokens of a split, one shard after another, read by position. `len()` is their number.

    Args:
        paths: the shards, at least one.
        recorded: the manifest's entry for each path; None without a manifest.

    dtype: uint16 or uint32, as in the shards.

    Raises:
        UserError: a shard cannot be read, differs in dtype, or is not as recorded.
    """

    def __init__(self, paths: Sequence[Path], recorded: Sequence[Shard] | None = None) -> None:
        self.paths = list(paths)
        self.recorded = recorded
        self._shards = [read_shard(path) for path in self.paths]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards]).tolist()
        self.dtype = self._shards[0].dtype
        for path, shard in zip(self.paths, self._shards, strict=True):
            if shard.dtype != self.dtype:
                raise UserError(
                    f"{path} holds {shard.dtype} tokens, but {self.paths[0]} {self.dtype}; prepare both again"
                )
        for path, shard, entry in zip(self.paths, self._shards, recorded or [], strict=recorded is not None):
            found = (len(shard), path.stat().st_size)
            if found != (entry.tokens, entry.bytes):
                raise UserError(
                    f"shard {path} has {found[0]} tokens in {found[1]} bytes, the manifest says {entry.tokens} "
                    f"in {entry.bytes}; prepare the folder again"
                )

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, 0 <= start <= stop <= len: read-only within a shard, a copy across."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        first = bisect_right(self._starts, start, hi=len(self._shards)) - 1
        if stop <= self._starts[first + 1]:
            return self._shards[first][start - self._starts[first] : stop - self._starts[first]]
        tokens = np.empty(stop - start, self.dtype)
        filled, index = 0, first
        while filled < len(tokens):
            offset = start + filled - self._starts[index]
            part = self._shards[index][offset : offset + len(tokens) - filled]
            tokens[filled : filled + len(part)] = part
            filled, index = filled + len(part), index + 1
        return tokens

    def check_range(self, vocab_size: int) -> None:
        """Raise UserError if a token id is known to be outside the vocabulary, without reading everything.

        Checks the manifest's maxima, and the first and last million tokens of each shard. A bad token further inside
        a shard without a manifest is not found: call `check_tokens` on tokens before using them.
        """
        for entry in self.recorded or []:
            check_tokens(np.array([entry.max_token]), vocab_size, f"shard {entry.file}")
        for path, shard in zip(self.paths, self._shards, strict=True):
            check_tokens(shard[:ENDS], vocab_size, f"shard {path}")
            check_tokens(shard[-ENDS:], vocab_size, f"shard {path}")


def open_split(folder: str | Path, split: str) -> Tokens:
    """The tokens of one split, "train" or "val", of a folder of shards.

    With a manifest, the shards it lists. Without one, every `.bin` and `.npy` file with the split last in its name,
    sorted, as in the folders of llm.c, modded-nanogpt and nanoGPT.

    Raises:
        UserError: no such folder, an unfinished preparation, no shard of the split, or a bad one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the shards")
    if (folder / MANIFEST).exists():
        recorded = [shard for shard in Manifest.load(folder).shards if shard.split == split]
        paths = [folder / shard.file for shard in recorded]
    elif (folder / PROGRESS).exists():
        raise UserError(f"{folder} holds an unfinished preparation; run the same command again to resume it")
    else:
        recorded = None
        paths = sorted(path for path in folder.iterdir() if _split_in_name(path) == split)
    if not paths:
        raise UserError(f"{folder} holds no {split} shard: no .bin or .npy file is named or listed as {split}")
    return Tokens(paths, recorded)


def _split_in_name(path: Path) -> str | None:
    stem = path.stem if path.suffix in (".bin", ".npy") else ""
    return max((split for split in SPLITS if split in stem), key=stem.rfind, default=None)  # constrained_val_000000


def verify(folder: str | Path, show_progress: bool = False) -> Manifest:
    """Read every shard of a folder and compare its sha256 with the manifest's, in parallel.

    Raises:
        UserError: no manifest, or a shard is missing or damaged; names all of them.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)

    def is_intact(shard: Shard) -> bool:
        path = folder / shard.file
        return path.is_file() and digest(path) == shard.sha256

    with ThreadPoolExecutor() as pool:
        checks: Iterable[bool] = pool.map(is_intact, manifest.shards)
        if show_progress:
            from rich.progress import track

            checks = track(checks, str(folder), len(manifest.shards), transient=True)
        intact = list(checks)
    damaged = [shard.file for shard, good in zip(manifest.shards, intact, strict=True) if not good]
    if damaged:
        raise UserError(f"{folder}: {', '.join(damaged)} missing or damaged; prepare the folder again")
    return manifest


def main(argv: Sequence[str]) -> None:
    """`python -m nanodisp.data.shards <folder> …` verifies the folders."""
    if not argv:
        raise UserError("give folders of prepared shards: python -m nanodisp.data.shards data/pystdlib/<folder>")
    for folder in argv:
        shards = verify(folder, show_progress=True).shards
        n_bytes = sum(shard.bytes for shard in shards)
        print(f"{folder}: {len(shards)} shards, {n_bytes / 1e6:,.1f} MB, checksums match")


if __name__ == "__main__":
    cli.run(main)
