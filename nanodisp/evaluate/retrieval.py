"""Retrieval: nDCG@10, MRR and recall@100 of a model's embeddings, beside BM25.

Of a folder in BEIR's layout (Thakur et al., arXiv 2104.08663): corpus.jsonl with _id, title and text, queries.jsonl
with _id and text, qrels/test.tsv with query-id, corpus-id and score under a head line. A document is its title, a
space and its text. If there is a qrels/dev.tsv, it chooses the layer and pooling. Or, without a data set, of the
validation split of a run: the first half of a text is to find the second.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from nanodisp.data.batches import spread_windows
from nanodisp.errors import UserError
from nanodisp.evaluate.bm25 import BM25, words
from nanodisp.evaluate.embeddings import is_empty
from nanodisp.evaluate.grid import Scores, unit

DEPTH = 1000  # documents of a ranking
AT_ONCE = 256  # queries whose scores are in memory together
HALVES, SHORTEST = 1000, 32  # texts of which a half finds the other, and the fewest tokens of one
LAYOUT = "a folder in BEIR's layout has corpus.jsonl, queries.jsonl and qrels/test.tsv"


@dataclass
class Retrieval:
    """Queries, documents, and which are relevant.

    relevant: per query, document number -> gain (above 0); -1, -2, … for relevant documents that the corpus lacks.
    dev_queries, dev_relevant: those that choose; empty without.
    n_empty: documents and queries that were left out because they are empty.
    """

    documents: list[str]
    queries: list[str]
    relevant: list[dict[int, float]]
    dev_queries: list[str] = field(default_factory=list)
    dev_relevant: list[dict[int, float]] = field(default_factory=list)
    n_empty: int = 0


def read_beir(folder: Path, limit: int | None = None) -> Retrieval:
    """A folder in BEIR's layout, and the first `limit` of its queries; raises UserError for another layout."""
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        if not (folder / name).is_file():
            raise UserError(f"data={folder} has no {name}: {LAYOUT}")
    documents = dict(_texts(folder / "corpus.jsonl"))
    queries = dict(_texts(folder / "queries.jsonl"))
    full = {key: text for key, text in documents.items() if not is_empty(text)}
    if not full:
        raise UserError(f"{folder / 'corpus.jsonl'} has no document that is not empty")
    number = {key: i for i, key in enumerate(full)}
    data = Retrieval(list(full.values()), [], [], n_empty=len(documents) - len(full))
    for split, texts, relevant in (
        ("test", data.queries, data.relevant),
        ("dev", data.dev_queries, data.dev_relevant),
    ):
        file = folder / "qrels" / f"{split}.tsv"
        for query, judged in _judgements(file).items() if file.is_file() else ():
            if query not in queries or not judged or len(texts) == limit:
                continue
            if is_empty(queries[query]):
                data.n_empty += 1
                continue
            texts.append(queries[query])
            lacking = (-1 - i for i in range(len(judged)))
            relevant.append({number.get(key, next(lacking)): gain for key, gain in judged.items()})
    if not data.queries:
        raise UserError(f"{folder / 'qrels/test.tsv'} has no relevant document for any query of queries.jsonl")
    if not any(document >= 0 for judged in data.relevant for document in judged):
        raise UserError(f"{folder / 'qrels/test.tsv'} judges no document of corpus.jsonl: its ids are others")
    return data


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """_id and text of each line of a jsonl file, after its title if it has one."""
    for place, line in _lines(file):
        try:
            row = json.loads(line)
            key, text, title = str(row["_id"]), row["text"], row.get("title")
            if not isinstance(text, str):
                raise TypeError
            yield key, " ".join(filter(None, (title, text)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{place} is not an object with _id and text: {LAYOUT}") from error


def _judgements(file: Path) -> dict[str, dict[str, float]]:
    """Query -> document -> gain, of the judgements above 0; the first line is the head."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for place, line in _lines(file):
        parts = line.split("\t")
        try:
            query, document, score = parts
            gain = float(score)
        except ValueError as error:
            if place.endswith(" line 1") and not parts[-1].strip().isdecimal():
                continue
            raise UserError(f"{place} is not query-id, corpus-id and score between tabs") from error
        if gain > 0:
            found[query][document] = gain
    return found


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Where a line is, and the line without its end; blank ones are skipped."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file} line {number}", line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from error


def halves(documents: Sequence[str], longest: int, limit: int | None = None) -> Retrieval:
    """Texts cut in the middle: each first half is a query, its second half the only relevant document.

    Args:
        documents: cut into texts of at most `longest` characters.
        limit: texts, at most; they are spread evenly over the documents.

    Raises UserError for fewer than two texts.
    """
    texts = [text[i : i + longest] for text in documents for i in range(0, len(text), longest)]
    pairs = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts if len(text) >= SHORTEST]
    pairs = [pair for pair in pairs if not any(map(is_empty, pair))]
    pairs = [pairs[i] for i in spread_windows(len(pairs), min(limit or HALVES, HALVES)).tolist()]
    if len(pairs) < 2:
        few = "limit=1 leaves" if limit == 1 else "the validation split has"
        raise UserError(f"{few} fewer than two texts to cut in halves: give data=<BEIR folder>, or more")
    firsts, seconds = (list(column) for column in zip(*pairs, strict=True))
    return Retrieval(seconds, firsts, [{i: 1.0} for i in range(len(pairs))])


# --- rankings and their metrics -------------------------------------------------------------------


def rank(scores: Tensor) -> np.ndarray:
    """The documents with the highest scores [Q, N], the highest first, at most DEPTH: int64 [Q, depth]."""
    return scores.topk(min(DEPTH, scores.size(1))).indices.numpy()


def rank_by_cosine(queries: Tensor, documents: Tensor) -> np.ndarray:
    """[Q, F], [N, F] -> int64 [Q, depth]."""
    queries, documents = unit(queries), unit(documents)
    return np.concatenate([rank(part @ documents.T) for part in queries.split(AT_ONCE)])


def rank_by_words(data: Retrieval) -> np.ndarray:
    """BM25's ranking of the documents for the queries, N in places that none is found for: int64 [Q, depth]."""
    model, n_documents = BM25([words(document) for document in data.documents]), len(data.documents)
    ranking = np.full((len(data.queries), min(DEPTH, n_documents)), n_documents)  # the number of no document
    for ranked, query in zip(ranking, data.queries, strict=True):
        scores = np.asarray(model.scores(words(query)))
        best = np.argsort(-scores, kind="stable")[: ranked.size]
        found = best[scores[best] > 0]  # a document without any of the words is not found
        ranked[: found.size] = found
    return ranking


def metrics(ranking: np.ndarray, relevant: Sequence[dict[int, float]]) -> Scores:
    """Means over queries, and their standard errors.

    ndcg@10: DCG of the first 10, sum of gain / log2(1 + rank), over that of the ideal ranking (Järvelin & Kekäläinen
        2002, with linear gains as in trec_eval and BEIR).
    mrr: 1 / rank of the first relevant document, 0 if it is not among the first 1,000.
    recall@100: share of the relevant documents among the first 100.
    """
    rows = []
    discount = 1 / np.log2(np.arange(2, 12))  # of ranks 1 to 10
    for ranked, gains in zip(ranking.tolist(), relevant, strict=True):
        ideal = sorted(gains.values(), reverse=True)[:10]
        dcg = sum(gains.get(document, 0.0) * weight for document, weight in zip(ranked, discount, strict=False))
        first = next((place for place, document in enumerate(ranked, start=1) if document in gains), math.inf)
        found = len(gains.keys() & set(ranked[:100]))
        rows.append((dcg / float(np.dot(ideal, discount[: len(ideal)])), 1 / first, found / len(gains)))
    values = np.array(rows)  # [Q, 3]
    errors = values.std(axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else np.full(3, math.nan)
    return dict(
        zip(("ndcg@10", "mrr", "recall@100"), zip(values.mean(0).tolist(), errors.tolist(), strict=True), strict=True)
    )
