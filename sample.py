"""Generate text from a checkpoint, written to the terminal token by token.

    python sample.py checkpoint=out/<run> prompt="def " max_new_tokens=200 temperature=0.8 top_k=50 seed=1
    python sample.py checkpoint=out/<run>@best prompt_file=question.txt      # or prompt=- for standard input
    python sample.py checkpoint=hf:gpt2 prompt="def "                        # needs nanodisp[eval]

Standard output is the text alone, including the prompt; several samples are separated by lines of `---`.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
import codecs
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from nanodisp import cli
from nanodisp.data.decode import read_whole
from nanodisp.data.tokenizer import Tokenizer
from nanodisp.distributed import hardware, start
from nanodisp.errors import UserError, to_stderr
from nanodisp.hf.open import open_for_text
from nanodisp.models.generate import generate
from nanodisp.training.compiled import keep_compiled

DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class SampleConfig:
    """What to generate, and how.

    checkpoint: a run's folder (its newest checkpoint), out/<run>@best (of the lowest validation loss) or @<step>, one
        checkpoint's folder, or a Hugging Face GPT-2, LLaMA or Qwen3: its folder or hf:<id>.
    prompt: the text to continue; "-" reads it from standard input, and an empty one begins a new document.
    prompt_file: a file with the prompt, in UTF-8, also in gzip.
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json, if the model's own is
        not available.
    max_new_tokens: tokens to generate.
    temperature: divides the logits; 0 is greedy.
    top_k: sample among the k likeliest tokens only; null for all.
    top_p: and among the likeliest that together have this probability.
    seed: of the first sample.
    num_samples: continuations of the prompt; the i-th, from 0, is the sample that `seed` + i alone gives.
    batch_size: samples generated together, which is faster; each has a cache of its own in memory.
    dtype: of weights and cache. "float32" generates the tokens of the full-precision model; "bfloat16" reads
        half the bytes, so it is up to twice as fast, but rounds logits to three digits; "auto" is bfloat16
        if the hardware multiplies it.
    compile: compile a block first, which takes some seconds. It saves small operations; on a CPU, which is
        bound by reading the weights, it gains little.
    device: "auto", "cpu" or "cuda".
    """

    checkpoint: str = cli.MISSING
    prompt: str = ""
    prompt_file: str | None = None
    tokenizer: str | None = None
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    seed: int = 1
    num_samples: int = 1
    batch_size: int = 8
    dtype: str = "float32"
    compile: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.prompt and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file are both given: give one of them")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must not be negative")
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or in [0.001, 1000]")
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed <= 2**63 - self.num_samples:
            raise ValueError(f"seed={self.seed} must be between 0 and 2**63 - num_samples")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is unknown; choose one of {', '.join(DTYPES)}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; null for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


def main(argv: Sequence[str]) -> None:
    config = cli.parse(SampleConfig, argv)
    device = start(config.device).device
    text = read_prompt(config)
    model, tokenizer, first_token = open_for_text(config.checkpoint, config.tokenizer)
    model = model.to(device, hardware.matmul_dtype(config.dtype, device))
    if config.compile:
        keep_compiled()
        model.compile_one_token()
    prompt = tokenizer.encode(text).tolist()
    unprompted = [] if prompt else [first_token]
    if len(prompt) > (read := model.config.block_size):
        to_stderr(f"the prompt has {len(prompt):,} tokens: the model reads the last {read:,}, its context")

    for first in range(0, config.num_samples, config.batch_size):
        seeds = [config.seed + i for i in range(first, min(first + config.batch_size, config.num_samples))]
        steps = generate(
            model,
            torch.tensor([prompt or unprompted] * len(seeds), device=device),
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
        )
        # the first sample while it is generated, then the others
        for row, same_steps in enumerate(itertools.tee(steps, len(seeds))):
            if first + row > 0:
                sys.stdout.write("---\n")
            write(text, itertools.chain(unprompted, map(itemgetter(row), same_steps)), tokenizer)


def read_prompt(config: SampleConfig) -> str:
    """The prompt, from the command line, a file or standard input; raises UserError if it is not UTF-8."""
    if config.prompt_file is not None:
        return read_whole(Path(config.prompt_file), f"prompt_file={config.prompt_file}")
    try:
        return sys.stdin.buffer.read().decode() if config.prompt == "-" else config.prompt
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8 (byte {error.start}): convert it, for example with iconv"
        ) from error


def write(prompt: str, tokens: Iterable[Tensor | int], tokenizer: Tokenizer) -> None:
    """Write a sample to standard output as its tokens arrive."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    sys.stdout.write(prompt)
    for token in tokens:
        sys.stdout.write(decoder.decode(tokenizer.decode_bytes([int(token)])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")


if __name__ == "__main__":
    cli.run(main, SampleConfig)
