"""Text from a checkpoint, written to the terminal as it is made.

    python sample.py checkpoint=out/<run> prompt="def " max_new_tokens=200 temperature=0.8 top_k=50 seed=1

Standard output holds the text alone, the prompt included.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanodisp import arguments, checkpoint, distributed, hf
from nanodisp.gpt import generate
from nanodisp.tokenizer import load_tokenizer


@dataclass
class SampleConfig:
    """checkpoint: a run's folder (its newest one) or one checkpoint's. temperature=0 is greedy."""

    checkpoint: str = arguments.MISSING
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    seed: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must not be negative")
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or lie in [0.001, 1000]")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2**63 - 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; null takes all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


def main(argv: Sequence[str]) -> None:
    config = arguments.parse(SampleConfig, argv)
    device = distributed.start(config.device).device
    saved = checkpoint.load(checkpoint.find(Path(config.checkpoint)))
    model = hf.build(hf.read_checkpoint(saved)).to(device).eval()
    tokenizer = load_tokenizer(hf.spec_of(saved))

    prompt = tokenizer.encode(config.prompt).tolist() or [tokenizer.eot]  # from nothing: a new document
    tokens = generate(
        model,
        torch.tensor([prompt], device=device),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    sys.stdout.write(config.prompt)
    for token in tokens:
        sys.stdout.write(decoder.decode(tokenizer.decode_bytes(token.tolist())))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")


if __name__ == "__main__":
    try:
        arguments.run(main)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
