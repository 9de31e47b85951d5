"""A byte-level BPE of Hugging Face behind the interface of `tokenizer.py`, from its tokenizer.json.

The file is used as it is, by the package `tokenizers`, so that a text gives the tokens that the model has learned,
whatever its pattern and its special tokens are. Two things differ from transformers: no text encodes to a special
token, and none is put around a text. As there, a byte that the vocabulary lacks is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nanodisp.errors import UserError, first_line, optional
from nanodisp.files import digest, write_whole

NAME, SETTINGS = "tokenizer.json", "tokenizer_config.json"  # the latter names the end-of-text token


def find(spec: Path) -> Path | None:
    """The file that a spec names: a .json file, or the tokenizer.json in a folder; None for another spec."""
    if spec.suffix == ".json":
        return spec
    return spec / NAME if (spec / NAME).is_file() else None


class JsonTokenizer:
    """A tokenizer.json of the kind "byte-level BPE", as of GPT-2, LLaMA 3, Qwen and SmolLM.

    Raises UserError if the file is of another kind or cannot be read, or if its end-of-text token is not known.
    """

    def __init__(self, file: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each call has one text; else forks print a warning
        tokenizers, (data, end) = optional("tokenizers"), read(file)
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises no class of its own
            raise UserError(f"{file} cannot be read: {first_line(error)}") from error
        if data["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(data["decoder"]):
            raise UserError(f"{file} is not a byte-level BPE, the only kind that is supported")
        self.backend.encode_special_tokens = True  # as the text that they are
        self.backend.no_truncation()
        self.backend.no_padding()
        self.file, self.name, self.end = file, file.resolve().parent.name, end
        byte_of = {letter: byte for byte, letter in enumerate(letters())}
        pieces = {id_: _spelled(token, byte_of) for token, id_ in self.backend.get_vocab().items()}
        added = self.backend.get_added_tokens_decoder().items()
        pieces |= {id_: b"" if token.special else token.content.encode() for id_, token in added}
        self.vocab_size = max(pieces) + 1
        self.pieces = [pieces.get(id_, b"") for id_ in range(self.vocab_size)]
        self.dtype = np.uint16 if self.vocab_size <= 65_536 else np.uint32
        self.eot = self.backend.token_to_id(end)
        if self.eot is None or self.eot in self.encode(end):
            raise UserError(f"{file}: its end-of-text token {end} is not one of its special tokens")

    def encode(self, text: str) -> np.ndarray:
        text = text.encode("utf-8", "replace").decode()
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=False)  # `encode` would hold the GIL
        return np.array(encoding.ids, self.dtype)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.pieces[token] for token in tokens if token < self.vocab_size)


def read(file: Path) -> tuple[dict[str, Any], str]:
    """The content of a tokenizer.json, and its end-of-text token.

    That is `eos_token` of tokenizer_config.json beside the file, else `eos_token_id` of config.json. Raises UserError
    if the file has not the form of a tokenizer.json, or if neither names a token of it.
    """
    try:
        data = json.loads(file.read_bytes())
        token = _object(file.with_name(SETTINGS)).get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
        ids = {id_: token for token, id_ in data["model"].get("vocab", {}).items()} if token is None else {}
        ids |= {token["id"]: token["content"] for token in data["added_tokens"]}
        if token is None:
            eos = _object(file.with_name("config.json")).get("eos_token_id")
            token = ids.get(eos[0] if isinstance(eos, list) else eos)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as a tokenizer: {first_line(error)}") from error
    if not isinstance(token, str):
        raise UserError(f"{file} has no known end-of-text token: name it as eos_token in {file.with_name(SETTINGS)}")
    return data, token


def identity(file: Path) -> str:
    """Identifies the tokens of a text and its end."""
    return f"{digest(file, 'blake2b')} {read(file)[1]}"


def copy(file: Path, folder: Path) -> None:
    """Copy a tokenizer.json as it is, and its settings, which name its end-of-text token, into `folder`."""
    settings = {**_object(file.with_name(SETTINGS)), "eos_token": read(file)[1]}
    write_whole(folder / NAME, file.read_bytes())
    write_whole(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())


def letters() -> list[str]:
    """GPT-2's letter for each byte: its own character if that is printable, else the next from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _spelled(token: str, byte_of: dict[str, int]) -> bytes:
    """The bytes of a token in GPT-2's letters."""
    try:
        return bytes([byte_of[letter] for letter in token])
    except KeyError:
        return token.encode()


def _object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file."""
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}
