"""BM25's scores are its formula's, and a public package's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodisp.evaluate.bm25 import BM25, words

texts = st.lists(st.sampled_from("abcdef"), max_size=12)


@given(st.lists(texts, min_size=1, max_size=8).filter(any), texts)
def test_scores_are_those_of_the_formula(documents: list[list[str]], query: list[str]) -> None:
    found = BM25(documents, k1=1.2, b=0.6).scores(query)
    mean = sum(map(len, documents)) / len(documents)
    for document, score in zip(documents, found, strict=True):
        expected = 0.0
        for word in query:
            tf, df = document.count(word), sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            expected += idf * tf / (tf + 1.2 * (1 - 0.6 + 0.6 * len(document) / mean))
        assert score == pytest.approx(expected)


def test_scores_are_those_of_bm25s() -> None:
    bm25s = pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    draw = lambda n: [f"w{i}" for i in rng.zipf(1.5, size=n) if i < 200]  # noqa: E731
    documents = [["w1", *draw(int(n))] for n in rng.integers(5, 80, size=100)]
    public = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    public.index(documents, show_progress=False)
    for query in ([w for w in draw(8) if w in public.vocab_dict] for _ in range(20)):
        assert BM25(documents).scores(query) == pytest.approx(public.get_scores(query), rel=1e-4, abs=1e-5)


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("What's the Mach-number, naïvely?") == ["what", "s", "the", "mach", "number", "naïvely"]
    assert words(" .,; ") == []


def test_a_document_without_words_scores_nothing() -> None:
    found, empty = BM25([["a"], []]).scores(["a", "b"])
    assert found > 0 == empty
