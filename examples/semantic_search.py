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
from nanodisp.data.decode import Tally
from nanodisp.data.documents import find_files, is_text, read_documents
from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import embed, open_embedder
from nanodisp.evaluate.grid import unit
from nanodisp.evaluate.held_out import passages
from nanodisp.evaluate.transforms import TRANSFORMS, fit


@dataclass
class SearchConfig:
    """What to search, and for what.

    checkpoint: the model.
    texts: a folder of text files, or one file.
    query: what to look for.
    characters: of a passage, at least; its last sentence is complete.
    layer: the index of a hidden state; -1 is the last.
    pooling: mean, last or weighted.
    transform: raw, centred, top removed or whitened.
    n: passages to print.
    """

    checkpoint: str = cli.MISSING
    texts: str = cli.MISSING
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
    files = [file for file in find_files(Path(config.texts), "utf-8")[0] if is_text(file)]
    index: list[tuple[Path, str]] = []
    for file in files:
        documents = ["".join(chunks) for chunks in read_documents(file, "text", "utf-8", Tally())]
        index += [(file, passage) for passage in passages(documents, config.characters)]
    if len(index) < 2:
        raise UserError(f"texts={config.texts} has {len(index)} passages: give more text, or fewer characters=…")
    embedder = open_embedder(config.checkpoint)
    options: Any = {"layers": [config.layer], "poolings": [config.pooling]}
    passages_of, query = (
        embed(embedder, texts, **options).vectors[0, 0] for texts in ([p for _, p in index], [config.query])
    )
    transform = fit(passages_of, passages_of.size(-1))[config.transform]
    cosines = (unit(transform(passages_of)) @ unit(transform(query)).T)[:, 0]  # [n_passages]
    for score, number in zip(*cosines.topk(min(config.n, len(index))), strict=True):
        file, passage = index[int(number)]
        print(f"{score:.4f}  {file}: {' '.join(passage.split())[:160]}")


if __name__ == "__main__":
    cli.run(main, SearchConfig)
