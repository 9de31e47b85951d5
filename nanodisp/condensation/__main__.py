"""Measure a model's condensation, layer by layer.

    python -m nanodisp.condensation checkpoint=out/<run>
    python -m nanodisp.condensation checkpoint=hf:gpt2 text=book.txt      # needs nanodisp[eval]

The measure is the cosine similarity of all pairs of different tokens of a sequence: near 1 is condensed, near 0 is
spread out. `measure.py` documents the other figures. Writes condensation.json, condensation.npz and figures.
"""

from __future__ import annotations

import nanodisp.threads  # noqa: F401 - first: torch reads what it sets

# isort: split
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanodisp import cli
from nanodisp.condensation import figures
from nanodisp.condensation.measure import hidden_states, measure
from nanodisp.data.batches import count_windows, read_windows, spread_windows
from nanodisp.data.prepare import DataConfig, prepare
from nanodisp.data.shards import open_split
from nanodisp.distributed import start
from nanodisp.errors import UserError
from nanodisp.hf.open import Measurable, open_for_measuring

LONGEST_BLOCK = 512  # tokens of a window, unless `block` is given
TOKENS_AT_ONCE = 2048  # tokens per forward pass


@dataclass
class CondensationConfig:
    """The model to measure, and the text to measure it on.

    checkpoint: a run's folder (its newest checkpoint), one checkpoint's, a Hugging Face folder, or hf:<id>.
    windows, block: number of windows and tokens per window, spread evenly over the text; block null is the
        model's context, at most 512.
    data, text: a folder of shards (its validation split) or a text file; null is the run's own data.
    include_diagonal: see `measure`.
    projection: how the tokens of a window are projected onto the plane: pca, tsne or umap (if installed).
    out: the folder to write to; null is the run's, or out/<model>.
    """

    checkpoint: str = cli.MISSING
    windows: int = 100
    block: int | None = None
    data: str | None = None
    text: str | None = None
    include_diagonal: bool = False
    projection: str = "pca"
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"windows={self.windows} must be at least 1")
        if self.block is not None and self.block < 2:
            raise ValueError(f"block={self.block}: a pair needs 2 tokens; null is the model's context")
        if self.data is not None and self.text is not None:
            raise ValueError("data and text are both given: give one of them")


def main(argv: Sequence[str]) -> None:
    config = cli.parse(CondensationConfig, argv)
    if config.projection not in figures.PROJECTIONS:
        raise UserError(f"projection={config.projection} is unknown; choose one of {', '.join(figures.PROJECTIONS)}")
    device = start(config.device).device
    subject = open_for_measuring(config.checkpoint)
    model = subject.model.to(device).eval()
    batches = list(open_windows(config, subject))
    result = measure(model, batches, include_diagonal=config.include_diagonal)
    folder = Path(config.out) if config.out else subject.folder
    result.save(folder, config.checkpoint)
    print(result)

    with torch.inference_mode():
        states = [z[0].float().cpu().numpy() for z in hidden_states(model, batches[0][:1].to(device))]
    chosen = sorted({round(fraction * (len(states) - 1)) for fraction in (0, 1 / 3, 2 / 3, 1)})
    tokens = {f"layer {layer}": states[layer] for layer in chosen}
    drawn = [
        *figures.save(figures.density({config.checkpoint: result.histogram}), folder / "figures" / "condensation"),
        *figures.save(figures.projection(tokens, config.projection), folder / "figures" / "tokens"),
    ]
    print("wrote", *(folder / f"condensation{end}" for end in (".json", ".npz")), *drawn)


def open_windows(config: CondensationConfig, subject: Measurable) -> Iterator[Tensor]:
    """The windows as batches, int64 [B, T]; raises UserError without data, or if it is shorter than one window."""
    block = config.block or min(subject.context, LONGEST_BLOCK)
    if block > subject.context:
        raise UserError(f"block={block} is longer than the model's context of {subject.context} tokens")
    rows = max(1, TOKENS_AT_ONCE // block)
    if config.text is not None:
        try:
            ids = torch.from_numpy(subject.encode(Path(config.text).read_text(errors="replace")).astype(np.int64))
        except OSError as error:
            raise UserError(f"text={config.text} cannot be read: {error.strerror}") from error
        if len(ids) < block:
            raise UserError(f"text={config.text} has {len(ids)} tokens: block={block} needs more, or a smaller block")
        chosen = spread_windows(len(ids) // block, config.windows)
        yield from ids[: len(ids) // block * block].view(-1, block)[chosen].split(rows)
        return
    data = subject.data if config.data is None else DataConfig(name="shards", path=config.data)
    if data is None:
        raise UserError("a Hugging Face model comes without data: give text=<file> or data=<folder of shards>")
    tokens = open_split(prepare(data), "val")
    chosen = spread_windows(count_windows(tokens, block), config.windows)
    for first in range(0, len(chosen), rows):
        yield read_windows(tokens, chosen[first : first + rows], block, subject.vocab_size)[0]


if __name__ == "__main__":
    cli.run(main)
