"""Our tokenizers as Hugging Face's fast tokenizers, and back.

Ours merge bytes by rank, theirs by a list of pairs. The two are equivalent: the bytes of a token are
merged within a text as they are on their own, so a token has exactly one pair that it is merged from,
the last two parts of its bytes merged by rank. A token that its bytes are never merged to occurs only
as a whole word, which both look up before they merge (`ignore_merges`).
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanodisp.data import tokenizer_json
from nanodisp.data.tokenizer import GPT2_PATTERN, PUBLISHED, ByteTokenizer, TiktokenTokenizer, Tokenizer, from_ranks
from nanodisp.data.tokenizer_json import JsonTokenizer, letters
from nanodisp.errors import UserError, first_line, optional

END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(tokenizer: Tokenizer) -> Any:
    """A `tokenizers.Tokenizer` that encodes and decodes any text as `tokenizer` does.

    Raises UserError if tokenizers is not installed, or if a text token is spelled like end-of-text.
    """
    tokenizers = optional("tokenizers")
    pre = tokenizers.pre_tokenizers
    if isinstance(tokenizer, TiktokenTokenizer):
        tokens = [tokenizer.encoding.decode_single_token_bytes(i) for i in range(tokenizer.n_text)]
        pattern = PUBLISHED.get(tokenizer.n_text, (GPT2_PATTERN,))[0]
        pattern = pattern.replace("{1,3}+", "{1,3}").replace("$", r"\z")  # possessive and end of text, in Oniguruma
        split = [pre.Split(tokenizers.Regex(pattern), "isolated")]
    else:
        tokens, split = [bytes([byte]) for byte in range(256)], []
    letter = letters()
    spell = lambda token: "".join(letter[byte] for byte in token)  # noqa: E731
    vocab = {spell(token): rank for rank, token in enumerate(tokens)}
    if END_OF_TEXT in vocab:
        raise UserError(f"the vocabulary {tokenizer.name} has {END_OF_TEXT} as text: it cannot be exported")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [tuple(map(spell, pair)) for token in tokens if (pair := merged_from(token, ranks))]
    model = tokenizers.models.BPE({**vocab, END_OF_TEXT: tokenizer.eot}, merges, ignore_merges=bool(split))
    result = tokenizers.Tokenizer(model)
    result.pre_tokenizer = pre.Sequence([*split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    result.decoder = tokenizers.decoders.ByteLevel()
    result.add_special_tokens([END_OF_TEXT])
    return result


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into a new folder; a tokenizer.json that was read stays as it is.

    Raises UserError as `build_tokenizer` does, before the folder is made.
    """
    if isinstance(tokenizer, JsonTokenizer):
        folder.mkdir(parents=True, exist_ok=True)
        return tokenizer_json.copy(tokenizer.file, folder)
    built = build_tokenizer(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT},
    }
    folder.mkdir(parents=True, exist_ok=True)
    built.save(str(folder / tokenizer_json.NAME))
    (folder / tokenizer_json.SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def merged_from(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that `token` is merged from when its bytes are merged by rank; None if they never are."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        first = min(range(len(merged)), key=merged.__getitem__)
        if merged[first] == len(ranks):
            return None
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder's tokenizer.json: bytes or ranks of ours where they encode the same, else the file.

    Raises UserError if it cannot be read, or is not a byte-level BPE.
    """
    tokenizers, file = optional("tokenizers"), folder / "tokenizer.json"
    try:
        theirs = json.loads(tokenizers.Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # tokenizers raises no class of its own
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    if [token["content"] for token in theirs["added_tokens"]] != [END_OF_TEXT]:
        return JsonTokenizer(file)
    byte_of = {letter: byte for byte, letter in enumerate(letters())}
    try:
        model, pre = theirs["model"], theirs["pre_tokenizer"]
        ranks = {bytes(map(byte_of.__getitem__, t)): rank for t, rank in model["vocab"].items() if t != END_OF_TEXT}
        plain = ranks == {bytes([byte]): byte for byte in range(256)}
        tokenizer = ByteTokenizer() if plain else from_ranks(folder, ranks)
        ours = json.loads(build_tokenizer(tokenizer).to_str())
        gpt2 = pre["type"] == "ByteLevel" and pre["use_regex"] and not pre["add_prefix_space"]
        same = (
            (pre == ours["pre_tokenizer"] or (gpt2 and not plain and len(ranks) not in PUBLISHED))
            and theirs["normalizer"] is None
            and (model["type"], model["merges"]) == ("BPE", ours["model"]["merges"])
            and (model["ignore_merges"] or len(model["merges"]) == len(ranks) - 256)
            and theirs["added_tokens"][0]["id"] == tokenizer.eot
        )
    except (KeyError, TypeError, UserError):
        same = False
    return tokenizer if same else JsonTokenizer(file)
