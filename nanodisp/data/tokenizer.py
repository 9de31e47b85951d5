"""Text to tokens and back: bytes, GPT-2's BPE, a `.tiktoken` or a tokenizer.json file, behind one small interface.

    python -m nanodisp.data.tokenizer train text=<file or folder> vocab_size=4096 to=<file>.tiktoken

trains a vocabulary of your own; it needs `pip install 'nanodisp[data]'`.

A tokenizer is named by a spec, the same string in the config, in a manifest and in a
checkpoint: "byte", "gpt2", the path of a `.tiktoken` file (one token per line: its bytes
in base64, a space, its rank), or the path of a tokenizer.json or of its folder (`tokenizer_json.py`).
Their packages are imported only when a spec needs them. "none" is the
spec of shards whose tokens cannot be turned into text; training needs only the tokens.

No text encodes to the end-of-text token, not even its name in a document.
"""

from __future__ import annotations

import base64
import sys
from codecs import iterdecode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nanodisp import cli
from nanodisp.data import tokenizer_json
from nanodisp.data.decode import Tally
from nanodisp.data.documents import PIECE, find_files, join_and_cut, read_documents
from nanodisp.data.shards import MANIFEST, Manifest, open_split
from nanodisp.data.split import split_by_name
from nanodisp.data.tokenizer_json import JsonTokenizer, letters
from nanodisp.errors import UserError, optional
from nanodisp.files import digest, write_whole

if TYPE_CHECKING:
    from tiktoken import Encoding

# How the published encodings split text before merging bytes.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"""
    r""" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
GPT2_VOCAB_SIZE = 50_257
# A file of ranks does not record its pattern or its end-of-text token; the published ones are
# recognised by their number of ranks (both of these leave one id unused before end-of-text).
PUBLISHED = {100_256: (CL100K_PATTERN, 100_257), 199_998: (O200K_PATTERN, 199_999)}


SPECS = "byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json"
NO_FILE = ("byte", "gpt2", "none")


class Tokenizer(Protocol):
    """The interface that the rest of nanodisp uses.

    name: "byte", "gpt2", a `.tiktoken` file's name without its suffix, or that of a tokenizer.json's folder.
    vocab_size: ids run from 0 to vocab_size - 1.
    eot: the id of the end-of-text token, which ends every document.
    """

    name: str
    vocab_size: int
    eot: int

    def encode(self, text: str) -> np.ndarray:
        """Tokens of `text`, [n_tokens], uint16, or uint32 if vocab_size > 65,536.

        A lone surrogate, which UTF-8 cannot encode, becomes "?".
        """
        ...

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of the tokens: UTF-8, but a character may span two tokens.

        End-of-text and unused ids give no bytes.
        """
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 and an end-of-text token."""

    name = "byte"
    vocab_size = 257
    eot = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token < self.eot)


class TiktokenTokenizer:
    """A tiktoken encoding with its ordinary tokens and a single special token, end-of-text.

    Args:
        encoding: the tiktoken encoding.
        n_text: number of ordinary tokens, whose ids are 0 to n_text - 1.
        eot: the end-of-text id, at least n_text; the last of the vocabulary.
    """

    def __init__(self, name: str, encoding: Encoding, n_text: int, eot: int) -> None:
        self.name = name
        self.encoding = encoding
        self.n_text = n_text
        self.eot = eot
        self.vocab_size = eot + 1
        self.dtype = np.uint16 if self.vocab_size <= 65_536 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        try:
            tokens = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            tokens = self.encoding.encode_to_numpy(text.encode("utf-8", "replace").decode(), disallowed_special=())
        return tokens.astype(self.dtype)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes([int(token) for token in tokens if token < self.n_text])


def vocab_size_of(spec: str) -> int:
    """The vocabulary size of a spec; GPT-2's is known without its file of ranks."""
    return GPT2_VOCAB_SIZE if spec == "gpt2" else load_tokenizer(spec).vocab_size


def end_of_text(spec: str, vocab_size: int | None) -> int:
    """The end-of-text token of a spec: what its tokenizer.json says, else the last of the vocabulary."""
    return load_tokenizer(spec).eot if _json_file(spec) else (vocab_size or vocab_size_of(spec)) - 1


def load_tokenizer(spec: str | Path, folder: Path = Path()) -> Tokenizer:
    """The tokenizer for a spec: "byte", "gpt2" or the path of a file.

    Args:
        spec: a relative path is relative to `folder`.
        folder: that of the shards, if the spec comes from their manifest.

    Raises:
        UserError: unknown spec or "none", missing or damaged file, or GPT-2's ranks cannot be downloaded.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if str(spec) == "gpt2":
        return _published_gpt2()
    if str(spec).endswith(".tiktoken"):
        return from_ranks(folder / spec, _read_ranks(folder / spec))
    if str(spec) == "none":
        raise UserError(f"tokenizer=none cannot encode text; choose {SPECS}")
    if file := tokenizer_json.find(folder / spec):
        return JsonTokenizer(file)
    raise UserError(f"tokenizer={spec} is unknown; choose {SPECS}")


def identity(spec: str) -> str:
    """Identifies the tokenizer of a spec: the spec, or a hash of its file; raises UserError if that cannot be read."""
    try:
        if spec.endswith(".tiktoken"):
            return digest(Path(spec), "blake2b")
        return tokenizer_json.identity(file) if (file := _json_file(spec)) else spec
    except OSError as error:
        raise UserError(f"data.tokenizer={spec} cannot be read: {error.strerror}") from error


def label(spec: str) -> str:
    """A short name for the tokenizer of a spec."""
    return file.resolve().parent.name if (file := _json_file(spec)) else Path(spec).stem


def copy_tokenizer(spec: str, folder: Path, name: str | None = None) -> str:
    """Copy the file of a spec into a folder and return the spec of the copy, relative to the folder.

    A spec without a file is returned as it is. `name` is the new name of a `.tiktoken` file. Raises OSError, UserError.
    """
    if spec.endswith(".tiktoken"):
        write_whole(folder / (name or Path(spec).name), Path(spec).read_bytes())
        return name or Path(spec).name
    if file := _json_file(spec):
        tokenizer_json.copy(file, folder)
        return tokenizer_json.NAME
    return spec


def _json_file(spec: str) -> Path | None:
    return None if spec in NO_FILE else tokenizer_json.find(Path(spec))


def _published_gpt2() -> TiktokenTokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a wrong hash is a ValueError
        raise UserError(
            "tokenizer=gpt2 needs its vocabulary once from the network or from the folder that TIKTOKEN_CACHE_DIR "
            f"names, and neither has it ({type(error).__name__}); offline, give the path of a .tiktoken file instead"
        ) from error
    return TiktokenTokenizer("gpt2", encoding, n_text=50_256, eot=50_256)


def from_ranks(path: Path, ranks: dict[bytes, int]) -> TiktokenTokenizer:
    """A tokenizer from token bytes -> rank, read from `path`; raises UserError if it could not encode every text."""
    import tiktoken

    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path}: the ranks of its {len(ranks)} distinct tokens must be 0 to {len(ranks) - 1}, each once"
        )
    if b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} must hold each of the 256 single bytes and no empty token, to encode every text")
    pattern, eot = PUBLISHED.get(len(ranks), (GPT2_PATTERN, len(ranks)))
    encoding = tiktoken.Encoding(
        path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eot}
    )
    return TiktokenTokenizer(path.stem, encoding, n_text=len(ranks), eot=eot)


def write_ranks(path: Path, tokenizer: TiktokenTokenizer) -> None:
    """Write a `.tiktoken` file; raises UserError when it cannot be written."""
    tokens = map(tokenizer.encoding.decode_single_token_bytes, range(tokenizer.n_text))
    write_whole(path, b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank."""
    try:
        lines = path.read_bytes().splitlines()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"tokenizer file {path} cannot be read: {error}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not a token in base64 and its rank: {line[:40]!r}") from error
    return ranks


# --- training a vocabulary ---------------------------------------------------------------

SMALLEST, LARGEST = 258, 1_000_000  # vocab_size: 256 bytes, one merge and end-of-text; more would not fit into memory


@dataclass
class TrainConfig:
    """Keys of `train`.

    text: a file of text, jsonl or parquet, or a folder of these without its files for validation and testing; or a
        folder of prepared shards, of which the training split is used.
    vocab_size: number of tokens, with the 256 bytes and end-of-text.
    to: the file to write, *.tiktoken.
    field: the key of jsonl, or the column of parquet, that holds the text.
    encoding: of text and jsonl files that do not begin with a byte order mark.
    """

    text: str = cli.MISSING
    vocab_size: int = cli.MISSING  # type: ignore[assignment]
    to: str = cli.MISSING
    field: str = "text"
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if not SMALLEST <= self.vocab_size <= LARGEST:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be {SMALLEST} (256 bytes, one merge, end-of-text) to {LARGEST:,}"
            )
        if self.vocab_size - 1 in PUBLISHED:
            raise ValueError(f"vocab_size={self.vocab_size} is that of a published encoding: choose another size")
        if not self.to.endswith(".tiktoken"):
            raise ValueError(f"to={self.to} must be a file named *.tiktoken")
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError) as error:
            raise ValueError(f"encoding={self.encoding} is unknown; utf-8 and cp1252 are examples") from error


def main(argv: Sequence[str]) -> None:
    """`python -m nanodisp.data.tokenizer train text=… vocab_size=… to=…`."""
    if not argv or argv[0] != "train":
        raise UserError("give train: python -m nanodisp.data.tokenizer train text=… vocab_size=… to=….tiktoken")
    config = cli.parse(TrainConfig, argv[1:])
    path, n_bytes = Path(config.to), 0
    if path.exists():
        raise UserError(f"to={path} exists: give another name, or delete it first")
    if not path.parent.is_dir():
        raise UserError(f"to={path}: there is no folder {path.parent}; create it first")

    def texts() -> Iterator[str]:
        nonlocal n_bytes
        for text in training_texts(config):
            n_bytes += len(text.encode())
            yield text

    try:
        tokens = train_bpe(texts(), config.vocab_size - 1)
    except UserError as error:  # a run has these keys in its section data
        raise UserError(str(error).replace("data.path=", "text=").replace("data.", "")) from error
    if len(tokens) < config.vocab_size - 1:
        raise UserError(
            f"vocab_size={config.vocab_size} needs more text: the {n_bytes:,} bytes of {config.text} have pairs that "
            f"repeat for at most {len(tokens) + 1} tokens"
        )
    write_ranks(path, from_ranks(path, {token: rank for rank, token in enumerate(tokens)}))
    print(f"wrote {path}: 256 bytes, {len(tokens) - 256:,} merges, end-of-text, from {n_bytes / 1e6:,.1f} MB of text")


def training_texts(config: TrainConfig) -> Iterator[str]:
    """The text to train on in pieces, see `TrainConfig.text`; lone surrogates become "?".

    Raises UserError as `find_files`, `read_documents` and `open_split` do.
    """
    path = Path(config.text)
    if (path / MANIFEST).is_file():
        documents = _documents_of_shards(path)
    else:
        files, _ = find_files(path, config.encoding)
        if path.is_dir():
            splits, _ = split_by_name(files, path)
            files = [file for file, split in splits.items() if split == "train"]
        documents = chain.from_iterable(read_documents(file, config.field, config.encoding, Tally()) for file in files)
    for text, _ in chain.from_iterable(map(join_and_cut, documents)):
        if text:
            yield text.encode("utf-8", "replace").decode()


def _documents_of_shards(folder: Path) -> Iterator[Iterable[str]]:
    """The documents of the training split of a folder of shards, each in chunks of its text."""
    tokens, tokenizer = open_split(folder, "train"), load_tokenizer(Manifest.load(folder).tokenizer, folder)

    def chunks(start: int, stop: int) -> Iterator[np.ndarray]:
        return (tokens.read(i, min(i + PIECE, stop)) for i in range(start, stop, PIECE))

    start, everything = 0, enumerate(chunks(0, len(tokens)))
    ends = ((PIECE * i + np.flatnonzero(chunk == tokenizer.eot)).tolist() for i, chunk in everything)
    for stop in chain(chain.from_iterable(ends), (len(tokens),)):
        yield iterdecode((tokenizer.decode_bytes(chunk.tolist()) for chunk in chunks(start, stop)), "utf-8", "replace")
        start = stop  # end-of-text has no bytes


def train_bpe(texts: Iterable[str], n_tokens: int) -> list[bytes]:
    """Byte-pair encoding as GPT-2's: the 256 bytes, then at most `n_tokens` - 256 merges, most frequent first.

    Trained by Hugging Face's tokenizers, on all cores; the same texts give the same tokens.

    Raises UserError if tokenizers is not installed.
    """
    tokenizers = optional("tokenizers", extra="data")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's pattern
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=2,
        initial_alphabet=byte_level.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {letter: byte for byte, letter in enumerate(letters())}
    merged = sorted((rank, token) for token, rank in tokenizer.get_vocab().items() if len(token) > 1)
    return [bytes([byte]) for byte in range(256)] + [bytes(map(byte_of.__getitem__, token)) for _, token in merged]


if __name__ == "__main__":
    cli.run(main, TrainConfig)
