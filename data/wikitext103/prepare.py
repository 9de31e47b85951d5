"""WikiText-103, raw: the good and featured articles of Wikipedia, 540 MB, 118 million GPT-2 tokens.

From Salesforce/wikitext on the Hugging Face hub. Its own training and validation splits are
kept, so `val_fraction` has no effect. Needs `pip install 'nanodisp[data]'`.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanodisp.data.documents import Piece, cut, read_hub
from nanodisp.data.prepare import DataConfig, main, prepare_pieces

REPO = "Salesforce/wikitext"
TITLE = re.compile(r" = [^=].* = \n")  # of an article; titles of sections have two or more equals signs


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Articles, joined from the rows of the data set, which are lines."""
    article: list[str] = []
    for line in lines:
        if TITLE.fullmatch(line) and "".join(article).strip():
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def pieces(repo: str, subset: str | None, field: str) -> Iterator[Piece]:
    """The pieces of both splits."""
    for split, published in (("train", "train"), ("val", "validation")):
        for article in articles(read_hub(repo, subset, published, field)):
            yield from (Piece(split, text, ends) for text, ends in cut(article))


def prepare(config: DataConfig, repo: str = REPO, subset: str | None = "wikitext-103-raw-v1") -> Path:
    return prepare_pieces(config, pieces(repo, subset, config.field), "wikitext103", f"{repo} {subset}")


if __name__ == "__main__":
    main(prepare)
