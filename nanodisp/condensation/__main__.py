"""Measure a model's condensation, layer by layer.

    python -m nanodisp.condensation checkpoint=out/<run>
    python -m nanodisp.condensation checkpoint=hf:gpt2 text=book.txt      # needs nanodisp[eval]
    python -m nanodisp.condensation cka out/<run> [out/<other>]           # layers, steps and runs, from snapshots

A Hugging Face model is a decoder (GPT-2, LLaMA, Qwen, OPT, …) or an encoder (BERT, RoBERTa, …).

The measure is the cosine similarity of all pairs of different tokens of a sequence: near 1 is condensed, near 0 is
spread out. `measure.py` documents the other figures. Writes condensation.json, condensation.npz and figures.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanodisp import cli
from nanodisp.condensation import figures, over_training
from nanodisp.condensation.measure import hidden_states, measure
from nanodisp.condensation.over_training import CkaConfig
from nanodisp.data.batches import spread_windows
from nanodisp.data.decode import read_whole
from nanodisp.data.prepare import DataConfig, prepare
from nanodisp.data.shards import Manifest, check_tokens, open_split
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.distributed import start
from nanodisp.errors import UserError
from nanodisp.hf.corpus import folder_of_data
from nanodisp.hf.open import PROBE, Measurable, open_for_measuring
from nanodisp.models.quantize import check_scheme, quantize

LONGEST_BLOCK = 512  # tokens of a window, unless `block` is given
TOKENS_AT_ONCE = 2048  # tokens per forward pass


@dataclass
class CondensationConfig:
    """The model to measure, and the text to measure it on.

    checkpoint: a run's folder (its newest checkpoint), out/<run>@best (of the lowest validation loss) or @<step>, one
        checkpoint's folder, a Hugging Face folder, or hf:<id>.
    windows, block: number of windows and tokens per window, spread evenly over the text; block null is the
        model's context, at most 512.
    data, text: a folder of shards (its validation split) or a text file in UTF-8, also in gzip; null is the
        run's own data.
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json, if the run's own is not
        available.
    include_diagonal: see `measure`.
    without: this many principal directions of each layer are removed before it is measured: 1 shows what is left
        without a massive activation.
    quantize: int8, int4, w8a8 or w4a4: the model is measured after rounding, see `models/quantize.py`.
    projection: how the tokens of a window are projected onto the plane: pca, tsne or umap (if installed).
    device: "auto", "cpu" or "cuda".
    out: the folder to write to; null is the run's, or out/<model>.
    """

    checkpoint: str = cli.MISSING
    windows: int = 100
    block: int | None = None
    data: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    include_diagonal: bool = False
    without: int = 0
    quantize: str | None = None
    projection: str = "pca"
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"windows={self.windows} must be at least 1")
        if self.without < 0:
            raise ValueError(f"without={self.without} must not be negative")
        check_scheme(self.quantize)
        if self.block is not None and self.block < 2:
            raise ValueError(f"block={self.block}: a pair needs 2 tokens; null is the model's context")
        if self.data is not None and self.text is not None:
            raise ValueError("data and text are both given: give one of them")


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] == "cka":
        return over_training.main(argv[1:])
    config = cli.parse(CondensationConfig, argv)
    if config.projection not in figures.PROJECTIONS:
        raise UserError(f"projection={config.projection} is unknown; choose one of {', '.join(figures.PROJECTIONS)}")
    device = start(config.device).device
    subject = open_for_measuring(config.checkpoint, config.tokenizer)
    model = subject.model.to(device).eval()
    batches = list(open_windows(config, subject))
    folder = Path(config.out) if config.out else subject.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the measurement, which may take long
    except OSError as error:
        raise UserError(f"out={folder} cannot be created: {error.strerror}; give another folder") from error
    name = f"{subject.name} in {config.quantize}" if config.quantize else subject.name
    name = f"{name} without {config.without} directions" if config.without else name
    refuse_another(folder, name)
    if config.quantize:
        quantize(model, config.quantize)
    result = measure(model, batches, include_diagonal=config.include_diagonal, without=config.without)
    result.save(folder, name)
    print(f"{name}: windows={result.windows} block={result.block}", result, sep="\n")

    with torch.inference_mode():
        states = [z[0].float().cpu().numpy() for z in hidden_states(model, batches[0][:1].to(device))]
    chosen = sorted({round(fraction * (len(states) - 1)) for fraction in (0, 1 / 3, 2 / 3, 1)})
    tokens = {f"layer {layer}": states[layer] for layer in chosen}
    drawn = [
        *figures.save(figures.density({name: result.histogram}), folder / "figures" / "condensation"),
        *figures.save(figures.projection(tokens, config.projection), folder / "figures" / "tokens"),
    ]
    print("wrote", *(folder / f"condensation{end}" for end in (".json", ".npz")), *drawn)


def refuse_another(folder: Path, name: str) -> None:
    """UserError if the folder holds the results of another model or step, or without other directions."""
    file = folder / "condensation.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or nothing of ours
        earlier = json.loads(file.read_text())["source"]
        if earlier != name:
            raise UserError(f"{file} is of {earlier}, this is {name}: give another folder with out=…, or delete it")


def open_windows(config: CondensationConfig, subject: Measurable) -> Iterator[Tensor]:
    """The windows as batches, int64 [B, T]; raises UserError without data, or if it is shorter than one window."""
    block = config.block or min(subject.context, LONGEST_BLOCK)
    if block > subject.context:
        raise UserError(f"block={block} is longer than the model's context of {subject.context} tokens")
    if config.text is not None:
        where, ids = f"text={config.text}", subject.encode(read_whole(Path(config.text), f"text={config.text}"))
        if (highest := ids.max(initial=0)) >= subject.vocab_size:
            raise UserError(
                f"the tokenizer of {subject.name} gives token {highest}, the model has {subject.vocab_size}"
            )
        n_tokens, read = len(ids), lambda start, stop: ids[start:stop]
    else:
        folder = open_data(config, subject)
        tokens = open_split(folder, "val")
        where, n_tokens, read = (
            f"the validation split of {folder}",
            len(tokens) - 1,
            tokens.read,
        )  # the last is a target
    if n_tokens < block:
        hint = f", or block={n_tokens}" if n_tokens > 1 else ""
        raise UserError(f"{where} has {n_tokens} tokens, a window {block}: give a longer text{hint}")
    chosen = spread_windows(n_tokens // block, config.windows)
    at_once = max(1, TOKENS_AT_ONCE // block)
    for first in range(0, len(chosen), at_once):
        starts = (chosen[first : first + at_once] * block).tolist()
        rows = np.stack([read(start, start + block) for start in starts])
        check_tokens(rows, subject.vocab_size, where)
        yield torch.from_numpy(rows.astype(np.int64))


def open_data(config: CondensationConfig, subject: Measurable) -> Path:
    """The folder of shards to measure on; raises UserError if the run's data are missing or have changed since."""
    others = "give text=<file> or data=<folder of shards>"
    if config.data is not None:
        folder = prepare(DataConfig(name="shards", path=config.data))
        check_tokenizer(folder, subject)
        return folder
    return folder_of_data(subject, others)


def check_tokenizer(folder: Path, subject: Measurable) -> None:
    """Raises UserError if the tokenizers of shards and model are both available and differ."""
    try:
        ours = subject.encode(PROBE)
        theirs = load_tokenizer(Manifest.load(folder).tokenizer, folder).encode(PROBE)
    except UserError:
        return
    if ours.tolist() != theirs.tolist():
        raise UserError(f"data={folder} was made with another tokenizer than that of {subject.name}: give text=<file>")


if __name__ == "__main__":
    cli.run(main, CondensationConfig, CkaConfig)
