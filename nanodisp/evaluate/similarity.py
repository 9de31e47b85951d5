"""Semantic textual similarity: does the cosine of two sentences order pairs as people do?"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from nanodisp.errors import UserError
from nanodisp.evaluate.embeddings import is_empty
from nanodisp.evaluate.grid import Scores, unit

LAYOUT = "sentence1,sentence2,score"


class Pairs(NamedTuple):
    """Sentences, the people's score of each pair, and how many pairs were left out because a sentence is empty."""

    firsts: list[str]
    seconds: list[str]
    gold: list[float]
    n_empty: int


def find_pairs(folder: Path) -> tuple[Path, Path | None]:
    """The files of the test and, if there is one, the dev split; raises UserError without exactly one test split."""
    tests, devs = sorted(folder.glob("*test.csv")), sorted(folder.glob("*dev.csv"))
    if len(tests) != 1:
        raise UserError(f"data={folder} has {len(tests)} files *test.csv, not one: its lines are {LAYOUT}")
    return tests[0], devs[0] if devs else None


def read_pairs(file: Path, limit: int | None = None) -> Pairs:
    """The first `limit` pairs of a CSV file, with or without a head line; raises UserError for another layout."""
    pairs = Pairs([], [], [], 0)
    n_empty = 0
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.reader(lines)
            for row in reader:
                if not row or (reader.line_num == 1 and row[-1].strip() == "score"):
                    continue
                if len(row) != 3 or not _is_number(row[2]):
                    raise UserError(f"{file} line {reader.line_num} is not {LAYOUT}")
                if is_empty(row[0]) or is_empty(row[1]):
                    n_empty += 1
                elif len(pairs.gold) != limit:
                    pairs.firsts.append(row[0])
                    pairs.seconds.append(row[1])
                    pairs.gold.append(float(row[2]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV in UTF-8: {error}") from error
    if len(pairs.gold) < 3:
        has = f"limit={limit} leaves {file}" if limit == len(pairs.gold) else f"{file} has"
        raise UserError(f"{has} {len(pairs.gold)} pairs: a correlation needs 3")
    return pairs._replace(n_empty=n_empty)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def spearman(firsts: Tensor, seconds: Tensor, gold: list[float]) -> Scores:
    """Spearman's rank correlation of the cosines of pairs, [n, F] each, with their gold scores; NaN if all are equal.

    The standard error is that of Fisher's z at the value found, (1 - rho^2) / sqrt(n - 3).
    """
    cosines = (unit(firsts) * unit(seconds)).sum(dim=-1)
    if torch.all(cosines == cosines[0]) or len(set(gold)) == 1:
        return {"spearman": (math.nan, math.nan)}
    rho = float(stats.spearmanr(cosines.numpy(), gold).statistic)
    return {"spearman": (rho, (1 - rho**2) / math.sqrt(len(gold) - 3) if len(gold) > 3 else math.nan)}
