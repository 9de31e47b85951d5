"""The passages of a folder of texts that are nearest to a query, by a model's embeddings.

    python examples/semantic_search.py checkpoint=out/<run> texts=<folder> query="how is a checkpoint saved"

`checkpoint` is a run, a Hugging Face folder or hf:<id> (needs `pip install 'nanodisp[eval]'`). The vectors are centred
on the passages themselves, which makes a language model's more useful. transform=whitened often does more if there are
several times as many passages as features; transform=raw is for a model that was trained to embed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodisp import cli
from nanodisp.data.decode import read_whole
from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import embed, open_embedder
from nanodisp.evaluate.grid import unit
from nanodisp.evaluate.held_out import passages
from nanodisp.evaluate.transforms import TRANSFORMS, fit


@dataclass
class SearchConfig:
    """What to search, and for what.

    checkpoint: the model.
    texts: a folder of text files.
    files: which of them, by their names.
    query: what to look for.
    characters: of a passage, at least; its last sentence is complete.
    layer: the index of a hidden state; -1 is the last.
    pooling: mean, last or weighted.
    transform: raw, centred, top removed or whitened.
    n: passages to print.
    """

    checkpoint: str = cli.MISSING
    texts: str = cli.MISSING
    files: str = "*.txt"
    query: str = cli.MISSING
    characters: int = 300
    layer: int = -1
    pooling: str = "mean"
    transform: str = "centred"
    n: int = 10

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform={self.transform} is unknown; choose one of {', '.join(TRANSFORMS)}")
        for name in ("characters", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def main(argv: Sequence[str]) -> None:
    config = cli.parse(SearchConfig, argv)
    files = sorted(file for file in Path(config.texts).rglob(config.files) if file.is_file())
    index = [
        (file, passage) for file in files for passage in passages([read_whole(file, str(file))], config.characters)
    ]
    if len(index) < 2:
        raise UserError(f"texts={config.texts} has {len(index)} passages in files={config.files}: give more text")
    embedder = open_embedder(config.checkpoint)
    options: Any = {"layers": [config.layer], "poolings": [config.pooling]}
    found, query = (embed(embedder, t, **options).vectors[0, 0] for t in ([p for _, p in index], [config.query]))
    transform = fit(found, found.size(-1))[config.transform]
    cosines = (unit(transform(found)) @ unit(transform(query)).T)[:, 0]  # [n_passages]
    for score, number in zip(*cosines.topk(min(config.n, len(index))), strict=True):
        file, passage = index[int(number)]
        print(f"{score:.4f}  {file}: {' '.join(passage.split())[:160]}")


if __name__ == "__main__":
    cli.run(main, SearchConfig)
