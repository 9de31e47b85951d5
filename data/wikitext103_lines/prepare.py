"""WikiText-103, raw, as the authors of arXiv 2602.00217 train on it: the lines that are not empty, one after the other.

Each split is a single text without end-of-text between its articles; `wikitext103` has articles. From
Salesforce/wikitext on the Hugging Face hub. Needs `pip install 'nanodisp[data]'`.
"""

from collections.abc import Iterator
from pathlib import Path

from nanodisp.data.documents import Piece, join_and_cut, read_hub
from nanodisp.data.prepare import DataConfig, main, prepare_pieces

REPO = "Salesforce/wikitext"


def pieces(repo: str, subset: str | None, field: str) -> Iterator[Piece]:
    """The pieces of both splits."""
    for split, published in (("train", "train"), ("val", "validation")):
        lines = (line for line in read_hub(repo, subset, published, field) if line.strip())
        yield from (Piece(split, text, ends) for text, ends in join_and_cut(lines))


def prepare(config: DataConfig, repo: str = REPO, subset: str | None = "wikitext-103-raw-v1") -> Path:
    return prepare_pieces(config, pieces(repo, subset, config.field), "wikitext103_lines", f"{repo} {subset}, lines")


if __name__ == "__main__":
    main(prepare)
