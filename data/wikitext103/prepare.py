"""WikiText-103, raw: the good and featured articles of Wikipedia, 540 MB, 118 million GPT-2 tokens.

From Salesforce/wikitext on the Hugging Face hub. Its own training and validation splits are
kept, so `val_fraction` has no effect. Needs `pip install 'nanodisp[data]'`.
"""

from collections.abc import Iterator
from pathlib import Path

from nanodisp.data.documents import Piece, cut, read_hub, wikitext_articles
from nanodisp.data.prepare import DataConfig, main, prepare_pieces

REPO = "Salesforce/wikitext"


def pieces(repo: str, subset: str | None, field: str) -> Iterator[Piece]:
    """The pieces of both splits."""
    for split, published in (("train", "train"), ("val", "validation")):
        for article in wikitext_articles(read_hub(repo, subset, published, field)):
            yield from (Piece(split, text, ends) for text, ends in cut(article))


def prepare(config: DataConfig, repo: str = REPO, subset: str | None = "wikitext-103-raw-v1") -> Path:
    return prepare_pieces(config, pieces(repo, subset, config.field), "wikitext103", f"{repo} {subset}")


if __name__ == "__main__":
    main(prepare)
