"""Measure a model's condensation, layer by layer.

    python -m nanodisp.condensation checkpoint=out/<run>
    python -m nanodisp.condensation checkpoint=hf:gpt2 text=book.txt      # needs nanodisp[eval]
    python -m nanodisp.condensation compare checkpoint=hf:gpt2,hf:gpt2-medium text=<file or folder>
    python -m nanodisp.condensation cka out/<run> [out/<other>]           # layers, steps and runs, from snapshots

A Hugging Face model is a decoder (GPT-2, LLaMA, Qwen, OPT, …) or an encoder (BERT, RoBERTa, …).

The measure is the cosine similarity of all pairs of different tokens of a sequence: near 1 is condensed, near 0 is
spread out. `measure.py` documents the other figures. Writes condensation.json, condensation.npz and figures.

`compare` sets several models beside each other, and beside the figures of arXiv 2602.00217.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanodisp import cli
from nanodisp.condensation import compare, figures, over_training
from nanodisp.condensation.measure import LOGARITHMIC, OTHERS, hidden_states, measure
from nanodisp.condensation.over_training import CkaConfig
from nanodisp.condensation.windows import open_windows
from nanodisp.distributed import start
from nanodisp.errors import UserError
from nanodisp.files import written_into
from nanodisp.hf.open import open_for_measuring
from nanodisp.models.quantize import check_scheme, quantize


@dataclass
class CondensationConfig:
    """Keys of a single model: what to measure, and the text to measure it on.

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
    without_largest: the number of dimensions that one of the measures leaves out.
    measures: main, or all for a second table with the other measures; the files have all of them.
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
    without_largest: int = 3
    measures: str = "main"
    quantize: str | None = None
    projection: str = "pca"
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"windows={self.windows} must be at least 1")
        if self.without < 0:
            raise ValueError(f"without={self.without} must not be negative")
        if self.without_largest < 1:
            raise ValueError(f"without_largest={self.without_largest} must be at least 1")
        if self.measures not in ("main", "all"):
            raise ValueError(f"measures={self.measures} is unknown; choose one of main, all")
        check_scheme(self.quantize)
        if self.block is not None and self.block < 2:
            raise ValueError(f"block={self.block}: a pair needs 2 tokens; null is the model's context")
        if self.data is not None and self.text is not None:
            raise ValueError("data and text are both given: give one of them")


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    if argv[:1] == ["cka"]:
        return over_training.main(argv[1:])
    config = cli.parse(CondensationConfig, argv)
    if config.projection not in figures.PROJECTIONS:
        raise UserError(f"projection={config.projection} is unknown; choose one of {', '.join(figures.PROJECTIONS)}")
    device = start(config.device).device
    subject = open_for_measuring(config.checkpoint, config.tokenizer)
    model = subject.model.to(device).eval()
    batches = list(open_windows(subject, config.text, config.data, config.windows, config.block))
    folder = Path(config.out) if config.out else subject.folder
    with written_into(folder):  # before the measurement, which may take long
        pass
    name = f"{subject.name} in {config.quantize}" if config.quantize else subject.name
    name = f"{name} without {config.without} directions" if config.without else name
    refuse_another(folder, name)
    if config.quantize:
        quantize(model, config.quantize)
    result = measure(
        model,
        batches,
        include_diagonal=config.include_diagonal,
        without=config.without,
        without_largest=config.without_largest,
    )
    result.save(folder, name)
    others = [result.table(OTHERS)] if config.measures == "all" else []
    print(f"{name}: windows={result.windows} block={result.block}", result, *others, sep="\n")

    with torch.inference_mode():
        states = [z[0].float().cpu().numpy() for z in hidden_states(model, batches[0][:1].to(device))]
    tokens = {f"layer {layer}": states[layer] for layer in figures.spread(len(states), 4)}
    drawn = [
        *figures.save(figures.density({name: result.histogram}), folder / "figures" / "condensation"),
        *figures.save(figures.measures(result.panels(), LOGARITHMIC), folder / "figures" / "measures"),
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


if __name__ == "__main__":
    cli.run(main, CondensationConfig, compare.CompareConfig, CkaConfig)
