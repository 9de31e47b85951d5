"""Linear probes: how well a logistic regression on a layer's embeddings tells classes of texts apart.

Each layer's vectors, the means over a text's tokens, are standardised and classified by scikit-learn's
LogisticRegression (its default penalty, C=1) in five stratified folds; the scaling is fitted in each fold's training
part.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from nanodisp.errors import UserError, optional
from nanodisp.evaluate.embeddings import is_empty

FOLDS = 5
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".npz")  # not classes of texts
LAYOUT = "a folder of classes has a file for each class, with a text in each line"


class Classes(NamedTuple):
    """Texts, the number of the class of each, the names of the classes, and how many lines were empty."""

    texts: list[str]
    labels: list[int]
    names: list[str]
    n_empty: int


def class_files(folder: Path) -> list[Path]:
    """The files of a folder that are classes: not hidden, no table, no README."""
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(f for f in files if f.suffix.lower() not in TABLES and not f.name.lower().startswith("readme"))


def read_classes(folder: Path, limit: int | None = None) -> Classes:
    """The texts of a folder, the first `limit` of each class; raises UserError for another layout or too few texts."""
    files = class_files(folder)
    if len(files) < 2:
        raise UserError(f"data={folder} has {len(files)} classes, not at least 2: {LAYOUT}")
    data = Classes([], [], [file.name for file in files], 0)
    n_empty = 0
    for label, file in enumerate(files):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from error
        lines = lines[:-1] if lines[-1] == "" else lines
        texts = [line.strip() for line in lines if not is_empty(line)]
        n_empty += len(lines) - len(texts)
        texts = texts[:limit]
        if len(texts) < FOLDS:
            has = f"limit={limit} leaves {file}" if limit == len(texts) else f"{file} has"
            raise UserError(f"{has} {len(texts)} texts: {FOLDS} folds need as many; {LAYOUT}")
        data.texts.extend(texts)
        data.labels.extend([label] * len(texts))
    return data._replace(n_empty=n_empty)


def make_classifier() -> Any:
    """Standardised features and a logistic regression, scikit-learn's; raises UserError without that package."""
    optional("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))


def probe(vectors: Tensor, labels: list[int], seed: int) -> np.ndarray:
    """Accuracy of each layer in each fold: vectors [layers, n, F] -> float64 [layers, FOLDS].

    seed: of the assignment of texts to folds.
    """
    classifier = make_classifier()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations are enough for accuracy
        return np.stack([cross_val_score(classifier, x.numpy(), labels, cv=folds) for x in vectors])
