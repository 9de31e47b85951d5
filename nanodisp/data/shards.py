"""Tokens on disk: the shard files, the manifest beside them, and a split read as one long array.

A shard that is written here has llm.c's layout: 256 little-endian int32 of header, of which the first three are
magic, version and token count, then the tokens, uint16 (magic 20240520, version 1) or uint32 (magic 20240801,
version 7). Three more are read as they lie: other people's shards of that layout, nanoGPT's headerless `train.bin`
and `val.bin` (uint16), and `.npy` files of one dimension (uint16 or uint32).

What is checked when: header, sizes and the manifest at open, which costs nothing; the range of the tokens by
`Tokens.check_range` (what the manifest recorded, and both ends of each shard) and by `check_tokens` on whatever is
about to be used; every byte by `verify`.
Files appear under their name only when they are whole and flushed to disk.
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
HEADERLESS = ("train.bin", "val.bin")  # what nanoGPT calls its files
QUESTIONS = 20240522  # llm.c's magic of a file that `questions.py` reads
MAX_TOKENS = 2**31 - 1  # of a shard: the header's count is an int32

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # there while a preparation is under way
FORMAT_VERSION = 1
ENDS = 1 << 20  # tokens at each end of a shard that `check_range` reads


# --- one shard ---------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write a shard, uint16 or uint32 as the tokens are; nobody ever sees half of it.

    Args:
        tokens: 1-D, uint16 or uint32, 1 to 2**31 - 1 of them.

    Raises:
        ValueError: other tokens. UserError: the file cannot be written (a full disk).
    """
    magic, version = next(((m, v) for m, (v, dtype) in KINDS.items() if dtype == tokens.dtype), (0, 0))
    if not magic or tokens.ndim != 1 or not 1 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(f"a shard takes 1 to 2**31 - 1 tokens, uint16 or uint32, not {tokens.dtype} {tokens.shape}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = magic, version, len(tokens)
    write_whole(path, header.data, np.ascontiguousarray(tokens).data)


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard of any of the kinds above, memory-mapped, 1-D uint16 or uint32.

    Raises:
        UserError: missing, empty, truncated, too long, or not a shard.
    """
    try:
        n_bytes = path.stat().st_size
        if n_bytes == 0:
            raise UserError(f"shard {path} is empty; download or prepare it again")
        return _read_npy(path) if path.suffix == ".npy" else _read_bin(path, n_bytes)
    except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
        raise UserError(f"shard {path} cannot be read: {error}") from error


def _read_bin(path: Path, n_bytes: int) -> np.ndarray:
    with path.open("rb") as file:
        start = file.read(12)
    magic, version, n_tokens = np.frombuffer(start, "<i4").tolist() if len(start) == 12 else (0, 0, 0)
    if magic not in KINDS:
        if path.name in HEADERLESS:
            return _read_headerless(path, n_bytes)
        if magic == QUESTIONS:
            raise UserError(f"{path} holds questions for train.eval_task, no tokens: move it to another folder")
        raise UserError(
            f"shard {path} begins with {magic}, not with one of the magic numbers {' or '.join(map(str, KINDS))}; "
            f"without a header only nanoGPT's {' and '.join(HEADERLESS)} are read"
        )
    known_version, dtype = KINDS[magic]
    if version != known_version:
        raise UserError(f"shard {path} has version {version}; of magic {magic} only version {known_version} is read")
    if n_tokens < 1:
        raise UserError(f"shard {path} claims {n_tokens} tokens; it needs at least one, prepare it again")
    expected = HEADER_BYTES + n_tokens * dtype.itemsize
    if n_bytes != expected:
        trouble = "truncated" if n_bytes < expected else "too long"
        raise UserError(
            f"shard {path} is {trouble}: its header promises {n_tokens} tokens in {expected} bytes, "
            f"the file has {n_bytes}; download or prepare it again"
        )
    return np.asarray(np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,)))


def _read_headerless(path: Path, n_bytes: int) -> np.ndarray:
    # No GPT-2 token can be mistaken for a header: read as uint16, both magic numbers begin with an id over 50,256.
    if n_bytes % 2:
        raise UserError(
            f"shard {path} has no header and {n_bytes} bytes, which uint16 tokens cannot fill; copy it again"
        )
    return np.asarray(np.memmap(path, "<u2", mode="r"))


def _read_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy has no one error for a broken header
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"shard {path} is not a whole .npy file: {reason}; download or make it again") from error
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype not in ("<u2", "<u4") or not len(tokens):
        found = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive"
        raise UserError(f"shard {path} holds {found}; allowed is one dimension of uint16 or uint32, not empty")
    if tokens.offset + tokens.nbytes != path.stat().st_size:  # a damaged header would shift every token
        raise UserError(f"shard {path} is longer than its {len(tokens)} tokens need; download or make it again")
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
    """What the manifest knows of one shard file. `bytes` and `sha256` are the whole file's."""

    file: str
    split: str
    tokens: int
    bytes: int
    sha256: str
    max_token: int

    def __post_init__(self) -> None:
        # The name comes from a file that may be a stranger's: it must stay inside the folder.
        if not isinstance(self.file, str) or not self.file or Path(self.file).name != self.file:
            raise ValueError(f"shard file {self.file!r} is not a plain file name")
        if self.split not in SPLITS:
            raise ValueError(f"the split of {self.file} is {self.split!r}, neither train nor val")
        for key, lowest in (("tokens", 1), ("bytes", 1), ("max_token", 0)):
            if type(getattr(self, key)) is not int or getattr(self, key) < lowest:
                raise ValueError(f"{key} of {self.file} is {getattr(self, key)!r}, not a whole number from {lowest} on")
        if not isinstance(self.sha256, str) or len(self.sha256) != 64:
            raise ValueError(f"sha256 of {self.file} is not 64 hex digits")


def describe_shard(path: Path, split: str) -> Shard:
    """The manifest's entry for a shard on disk; reads all of it."""
    tokens = read_shard(path)
    return Shard(path.name, split, len(tokens), path.stat().st_size, digest(path), int(tokens.max()))


@dataclass
class Manifest:
    """What a folder of shards holds. It is written last: where it lies, the folder is complete.

    tokenizer: a spec for `load_tokenizer`; a `.tiktoken` file lies beside the shards.
    vocab_size: every token is below it.
    source: where the text is from.
    bytes_per_token: split -> UTF-8 bytes of its text over its tokens, end-of-text included;
        what turns nats per token into bits per byte. Empty when not known.
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
            raise ValueError(f"its vocab_size is {self.vocab_size!r}, not a whole number from 1 to 2**32")
        if not isinstance(self.source, str):
            raise ValueError(f"its source is {self.source!r}, not a string")
        for split, ratio in self.bytes_per_token.items():
            if split not in SPLITS or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
                raise ValueError(f"its bytes_per_token has {split}: {ratio!r}, not a positive number for train or val")
        for shard in self.shards:
            if shard.max_token >= self.vocab_size:
                raise ValueError(f"{shard.file} holds token {shard.max_token}, its vocab_size is {self.vocab_size}")

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into the folder, whole or not at all."""
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
    """The tokens of a split, shard after shard, read by position. `len()` counts them.

    Args:
        name: what errors call it.
        paths: of its shards, one at least.
        recorded: the manifest's entries, one a path, if there is a manifest.

    dtype: uint16 or uint32, the shards' own.

    Raises:
        UserError: a shard cannot be read, differs in dtype, or is not as recorded.
    """

    def __init__(self, name: str, paths: Sequence[Path], recorded: Sequence[Shard] | None = None) -> None:
        self.name = name
        self.paths = list(paths)
        self.recorded = recorded
        self._shards = [read_shard(path) for path in self.paths]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards]).tolist()
        self.dtype = self._shards[0].dtype
        for path, shard in zip(self.paths, self._shards, strict=True):
            if shard.dtype != self.dtype:
                raise UserError(f"{path} holds {shard.dtype} tokens, {self.paths[0]} {self.dtype}; a split must agree")
        for path, shard, entry in zip(self.paths, self._shards, recorded or [], strict=recorded is not None):
            found = (len(shard), path.stat().st_size)
            if found != (entry.tokens, entry.bytes):
                raise UserError(
                    f"shard {path} has {found[0]} tokens in {found[1]} bytes, the manifest says {entry.tokens} "
                    f"in {entry.bytes}; prepare the folder again"
                )

    def __str__(self) -> str:
        return self.name

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
        """Raise UserError if a token is known not to fit the vocabulary, without reading everything.

        Looks at the maxima that the manifest recorded and at the first and last million tokens of each shard. A stray
        token inside a shard that nobody recorded passes: whoever uses tokens calls `check_tokens` on them.
        """
        for entry in self.recorded or []:
            if entry.max_token >= vocab_size:
                check_tokens(np.array([entry.max_token]), vocab_size, f"shard {entry.file}")
        for path, shard in zip(self.paths, self._shards, strict=True):
            check_tokens(shard[:ENDS], vocab_size, f"shard {path}")
            check_tokens(shard[-ENDS:], vocab_size, f"shard {path}")


def open_split(folder: str | Path, split: str) -> Tokens:
    """The tokens of one split, "train" or "val", of a folder of shards.

    With a manifest, as it says. Without, every `.bin` and `.npy` file with the split last in its name, sorted by name:
    the folders of llm.c, modded-nanogpt and nanoGPT.

    Raises:
        UserError: no such folder, an unfinished preparation, no shard of the split, or a bad one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; shards are read from the folder that they lie in")
    if (folder / MANIFEST).exists():
        recorded = [shard for shard in Manifest.load(folder).shards if shard.split == split]
        paths = [folder / shard.file for shard in recorded]
    elif (folder / PROGRESS).exists():
        raise UserError(f"{folder} holds an unfinished preparation; run the command that began it again, it goes on")
    else:
        recorded = None
        paths = sorted(path for path in folder.iterdir() if _split_in_name(path) == split)
    if not paths:
        raise UserError(f"{folder} holds no {split} shard: no .bin or .npy file is named or listed as {split}")
    return Tokens(f"the {split} split of {folder}", paths, recorded)


def _split_in_name(path: Path) -> str | None:
    stem = path.stem if path.suffix in (".bin", ".npy") else ""
    return max((split for split in SPLITS if split in stem), key=stem.rfind, default=None)  # constrained_val_000000


def verify(folder: str | Path, show_progress: bool = False) -> Manifest:
    """Read every shard of a folder and compare its sha256 with the manifest's; a shard a core.

    Raises:
        UserError: no manifest, or a shard is missing or differs; names all that do.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)

    def is_whole(shard: Shard) -> bool:
        path = folder / shard.file
        return path.is_file() and digest(path) == shard.sha256

    with ThreadPoolExecutor() as pool:
        checks: Iterable[bool] = pool.map(is_whole, manifest.shards)
        if show_progress:
            from rich.progress import track

            checks = track(checks, str(folder), len(manifest.shards), transient=True)
        whole = list(checks)
    damaged = [shard.file for shard, good in zip(manifest.shards, whole, strict=True) if not good]
    if damaged:
        raise UserError(f"{folder}: {', '.join(damaged)} missing or other than when prepared; prepare the folder again")
    return manifest


def main(argv: Sequence[str]) -> None:
    """`python -m nanodisp.data.shards <folder> …` verifies each."""
    if not argv:
        raise UserError("give folders of prepared shards: python -m nanodisp.data.shards data/pystdlib/<folder>")
    for folder in argv:
        shards = verify(folder, show_progress=True).shards
        n_bytes = sum(shard.bytes for shard in shards)
        print(f"{folder}: {len(shards)} shards, {n_bytes / 1e6:,.1f} MB, as they were prepared")


if __name__ == "__main__":
    cli.run(main)
