"""BM25, the baseline of retrieval: words alone, without a model."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

K1, B = 1.5, 0.75
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The lower-case words of a text, without stemming and with stop words."""
    return WORD.findall(text.lower())


class BM25:
    """Scores of documents for queries.

    score(q, d) = sum over words w of q of idf(w) tf / (tf + k1 (1 - b + b |d| / mean |d|)), with tf the count of w in d
    and idf(w) = ln(1 + (N - df + 0.5) / (df + 0.5)): Robertson's formula with Lucene's idf, which is never negative;
    Kamphuis et al., "Which BM25 Do You Mean?" (ECIR 2020). Lucene leaves out the constant factor k1 + 1.

    Args:
        documents: words of each, at least one document with a word.
    """

    def __init__(self, documents: Sequence[Sequence[str]], k1: float = K1, b: float = B) -> None:
        self.n_documents = len(documents)
        lengths = np.array([len(document) for document in documents])
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))  # [N]
        found: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for number, document in enumerate(documents):
            for word, count in Counter(document).items():
                found[word][0].append(number)
                found[word][1].append(count)
        self.postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # word -> documents, their scores for it
        for word, (numbers, counts) in found.items():
            idf = math.log(1 + (len(documents) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            tf = np.array(counts, dtype=np.float64)
            self.postings[word] = np.array(numbers), idf * tf / (tf + norm[numbers])

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """The score of every document, float64 [N]; a word that the query repeats counts as often."""
        scores = np.zeros(self.n_documents)
        for word in query:
            if word in self.postings:
                numbers, values = self.postings[word]
                scores[numbers] += values
        return scores
