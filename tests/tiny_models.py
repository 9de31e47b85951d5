"""Tiny random models as runs with a checkpoint, for the tests of hf/ and evaluate/."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from conftest import compose

from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.data.tokenizer_json import letters
from nanodisp.hf import __main__ as hf
from nanodisp.hf.open import open_run
from nanodisp.models.gpt import GPT, GPTConfig
from nanodisp.runs import checkpoint

SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
MERGES = [
    *(b"th", b"he", b"the", b" the", b"  ", b"\n\n", b"a b", b"\xc3\xa9", b"12", b"ab", b"aba", b"bab", b"\xc3"),
    b"xyz",  # never merged, because neither "xy" nor "yz" is a token: only ever a whole word
]


def write_ranks_file(path: Path) -> Path:
    """The single bytes in another order, then `MERGES`; the byte that both have counts once."""
    tokens = dict.fromkeys([*SINGLE_BYTES[::-1], *MERGES])
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def write_json_tokenizer(folder: Path, lacking: bytes = b"", think: int = 300, around: bool = True) -> Path:
    """A folder with a tokenizer.json as SmolLM's: a byte-level BPE that splits digits, its special tokens first.

    `think` is the id of "<think>", which is added but not special. With `around`, texts are begun, cut and padded.
    """
    import tokenizers
    from tokenizers import pre_tokenizers as pre

    letters_ = [letter for byte, letter in enumerate(letters()) if byte not in lacking]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ")]
    tokens = ["<|start|>", "<|end|>", *letters_, *(a + b for a, b in merges)]
    vocab = {**{token: id_ for id_, token in enumerate(tokens)}, "<think>": think}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    built.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<|start|>", "<|end|>"])
    built.add_tokens(["<think>"])
    if around:
        start = [("<|start|>", 0)]
        built.post_processor = tokenizers.processors.TemplateProcessing("<|start|> $A", special_tokens=start)
        built.enable_truncation(4)
        built.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|start|>", "eos_token": "<|end|>"}))
    return folder


def write_checkpointed_run(folder: Path, spec: str, std: float = 0.3, **shape: Any) -> Path:
    """A run's folder with a checkpoint of a random model; biases and LayerNorms are random too."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "d_ff": 24, **shape}
    model = GPT(GPTConfig(**shape, vocab_size=load_tokenizer(spec).vocab_size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    config = dataclasses.asdict(compose(f"data.tokenizer={spec}"))
    state = {"step": 3, "tokens": 96, "config": {**config, "model": dataclasses.asdict(model.config)}, "corpus": "text"}
    checkpoint.save(folder / "checkpoints", model.state_dict(), {}, state)
    return folder


def model_of(run: Path) -> GPT:
    return open_run(str(run)).model


def export(run: Path, to: Path) -> Path:
    hf.main(["export", f"checkpoint={run}", f"to={to}"])
    return to


def decided_model() -> GPT:
    """A model in eval mode whose large random weights make some tokens much likelier than others."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def loglikelihood(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One token at a time, within the window that ends the pair; and whether every token was the likeliest."""
    row = [*context, *continuation][-(model.config.block_size + 1) :]
    total, greedy = 0.0, True
    for end in range(len(row) - min(len(continuation), len(row) - 1), len(row)):
        with torch.no_grad():
            logits = model(torch.tensor([row[:end]])).logits[0, -1]
        total += logits.double().log_softmax(0)[row[end]].item()
        greedy &= int(logits.argmax()) == row[end]
    return total, greedy


def write_benchmarks(folder: Path, n: int = 12) -> Path:
    """A folder of local benchmarks, n items each, whose right answers are known, but not to a random model."""
    generator = torch.Generator().manual_seed(7)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return bytes((97 + torch.randint(0, 9, (length,), generator=generator)).tolist()).decode()

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa"):
        choices = [[f" {words(2, 9)}" for _ in range(3 + i % 2)] for i in range(n)]  # of unequal lengths
        rows = [{"context": words(4, 12), "choices": choices[i], "gold": i % 3} for i in range(n)]
        write(f"multiple_choice/{name}.jsonl", rows)
    contexts = [[words(3, 9), words(3, 9)] for _ in range(n)]
    rows = [{"contexts": contexts[i], "continuation": f" {words(3, 9)}", "gold": i % 2} for i in range(n)]
    write("multiple_choice/winogrande.jsonl", rows)
    pairs = [{"uid": f"p{i * 3 // n}", "good": words(5, 9), "bad": words(5, 9)} for i in range(n)]
    fields = ("syntax", "syntax/semantics", "morphology")
    write("blimp.jsonl", [{**pair, "field": fields[int(pair["uid"][1])]} for pair in pairs])
    write("lm/lambada_test_openai.jsonl", [{"text": f"{words(3, 9)} {words(3, 9)} {words(1, 2)}"} for _ in range(n)])
    header = "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source\n"
    answers = [[words(3, 9) for _ in range(4)] for _ in range(n)]
    lines = [f'A,B,"{words(3, 9)}, why?",{a},{c},{a}; {b},"{c}; {d};",\n' for a, b, c, d in answers]
    (folder / "truthfulqa").mkdir(exist_ok=True)
    (folder / "truthfulqa" / "TruthfulQA.csv").write_text(header + "".join(lines))
    (folder / "lm" / "wikitext-103").mkdir(parents=True, exist_ok=True)
    articles = [f" = {words(3, 9)} = \n \n {words(60, 90)} , {words(3, 9)} . \n = = Section = = \n" for _ in range(3)]
    (folder / "lm" / "wikitext-103" / "wiki.test.tokens").write_text(" \n" + "".join(articles))
    return folder
