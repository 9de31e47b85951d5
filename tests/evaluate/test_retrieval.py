"""Metrics of rankings, and what is read of a folder in BEIR's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.errors import UserError
from nanodisp.evaluate import retrieval
from nanodisp.evaluate.retrieval import Retrieval, halves, metrics, rank_by_cosine, rank_by_words, read_beir


def write_beir(folder: Path, documents: dict[str, str], queries: dict[str, str], **qrels: list[tuple[str, str, int]]):
    """A folder in BEIR's layout: documents without titles, and judgements per split."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = (json.dumps({"_id": key, "text": text}) for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for split, rows in qrels.items():
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    ranking = np.array([[3, 0, 1, 2], [2, 1, 0, 3]])
    found = metrics(ranking, [{0: 1.0, 2: 2.0}, {2: 1.0, -1: 1.0}])  # -1: relevant, but not in the corpus
    first = (1 / math.log2(3) + 2 / math.log2(5)) / (2 / math.log2(2) + 1 / math.log2(3))
    second = 1 / (1 + 1 / math.log2(3))
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(
        {"ndcg@10": (first + second) / 2, "mrr": (1 / 2 + 1) / 2, "recall@100": (1 + 1 / 2) / 2}
    )
    assert found["mrr"][1] == pytest.approx(np.std([1 / 2, 1], ddof=1) / math.sqrt(2))


def test_only_the_first_10_and_100_count() -> None:
    ranking = np.arange(200)[None]
    assert metrics(ranking, [{10: 1.0}])["ndcg@10"][0] == 0
    assert metrics(ranking, [{9: 1.0}])["ndcg@10"][0] == pytest.approx(1 / math.log2(11))
    assert metrics(ranking, [{100: 1.0, 99: 1.0}])["recall@100"][0] == 1 / 2
    assert metrics(ranking, [{100: 1.0}])["mrr"][0] == 1 / 101
    assert metrics(ranking, [{500: 1.0}])["mrr"][0] == 0


@given(st.lists(st.integers(0, 3), min_size=12, max_size=30).filter(any), st.integers(0, 99))
def test_ndcg_is_that_of_scikit_learn(gains: list[int], seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores = np.random.default_rng(seed).permutation(len(gains)).astype(float)
    ranking = np.argsort(-scores)[None]
    relevant = {i: float(gain) for i, gain in enumerate(gains) if gain}
    expected = sklearn.ndcg_score([gains], [scores], k=10)
    assert metrics(ranking, [relevant])["ndcg@10"][0] == pytest.approx(expected)


def test_documents_are_ranked_by_cosine_and_not_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "AT_ONCE", 2)
    documents = torch.tensor([[10.0, 10.0], [0.1, 0.0], [-1.0, 0.0]])
    queries = torch.tensor([[3.0, 0.1], [-1.0, 0.1], [1.0, 1.1]])
    assert rank_by_cosine(queries, documents).tolist() == [[1, 0, 2], [2, 0, 1], [0, 1, 2]]


def test_words_rank_documents() -> None:
    data = Retrieval(["a cat sat", "a dog ran", "the cat and the dog"], ["dog ran", "cat sat"], [{1: 1.0}, {0: 1.0}])
    assert rank_by_words(data)[:, 0].tolist() == [1, 0]
    unknown = Retrieval(["a cat", "a dog", "a cow", "the dog"], ["sheep", "dog"], [{0: 1.0}, {3: 1.0}])
    assert rank_by_words(unknown).tolist() == [[4] * 4, [1, 3, 4, 4]], "equal ones in their order, no other"
    assert metrics(rank_by_words(unknown), unknown.relevant)["recall@100"][0] == 0.5


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_read_with_titles_and_without_what_is_empty(tmp_path: Path) -> None:
    documents = {"d1": "one", "d2": " ", "d3": "three"}
    judged = [("q1", "d3", 2), ("q1", "d1", 0), ("q2", "d2", 1), ("q3", "d1", 1), ("q4", "gone", 1), ("q9", "d1", 1)]
    queries = {"q1": "first", "q2": "second", "q3": "", "q4": "fourth", "q5": "not judged"}
    folder = write_beir(tmp_path / "beir", documents, queries, test=judged, dev=[("q5", "d1", 1)])
    (folder / "corpus.jsonl").open("a").write('{"_id": 4, "title": "Title", "text": "text"}\n\n')
    data = read_beir(folder)
    assert data.documents == ["one", "three", "Title text"]
    assert data.queries == ["first", "second", "fourth"]
    assert data.relevant == [{1: 2.0}, {-1: 1.0}, {-1: 1.0}]
    assert (data.dev_queries, data.dev_relevant) == (["not judged"], [{0: 1.0}])
    assert data.n_empty == 2
    assert read_beir(folder, limit=1).queries == ["first"]


def test_other_layouts_are_reported_in_one_line(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir", {"d": "text"}, {"q": "text"}, test=[("q", "d", 1)])

    def rejected(file: str, content: str | None) -> str:
        before = (folder / file).read_text()
        (folder / file).unlink() if content is None else (folder / file).write_text(content)
        with pytest.raises(UserError) as error:
            read_beir(folder)
        (folder / file).write_text(before)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert read_beir(folder).queries == ["text"]
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        assert f"has no {file}: a folder in BEIR's layout has corpus.jsonl" in rejected(file, None)
    assert "corpus.jsonl line 2 is not an object with _id and text" in rejected("corpus.jsonl", '\n{"id": 1}\n')
    assert "queries.jsonl line 1 is not an object with" in rejected("queries.jsonl", "[1]\n")
    assert "queries.jsonl line 1 is not an object with" in rejected("queries.jsonl", '{"_id": 1, "text": null}\n')
    assert "has no document that is not empty" in rejected("corpus.jsonl", '{"_id": 1, "text": " "}\n')
    assert "test.tsv line 2 is not query-id, corpus-id and score" in rejected("qrels/test.tsv", "head\nq d 1\n")
    assert "has no relevant document for any query" in rejected("qrels/test.tsv", "h\tq\ts\nq\td\t0\n")
    assert "test.tsv line 1 is not" in rejected("qrels/test.tsv", "q\t0\td\t1\n"), "TREC's columns"
    assert "judges no document of corpus.jsonl" in rejected("qrels/test.tsv", "h\tq\ts\nq\td7\t1\n")
    (folder / "corpus.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        read_beir(folder)


def test_a_first_half_finds_its_second() -> None:
    data = halves(["abcdefgh" * 10, "short", "0123456789" * 4], longest=48)
    assert [q + d for q, d in zip(data.queries, data.documents, strict=True)] == [
        ("abcdefgh" * 6),
        ("abcdefgh" * 4),
        ("0123456789" * 4),
    ]
    assert all(abs(len(q) - len(d)) <= 1 for q, d in zip(data.queries, data.documents, strict=True))
    assert data.relevant == [{0: 1.0}, {1: 1.0}, {2: 1.0}]
    assert halves(["abcdefgh" * 100], 48, limit=3).queries == ["abcdefgh" * 3] * 3
    with pytest.raises(UserError, match="fewer than two texts"):
        halves(["abcdefgh" * 5], longest=48)
