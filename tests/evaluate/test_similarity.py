"""Spearman's correlation of cosines, and what is read of files of pairs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from nanodisp.errors import UserError
from nanodisp.evaluate.similarity import find_pairs, read_pairs, spearman


def test_the_cosines_are_correlated_with_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 8, generator=generator)
    gold = torch.randn(30, generator=generator).tolist()
    rho, error = spearman(a * torch.rand(30, 1, generator=generator), b, gold)["spearman"]
    cosines = torch.nn.functional.cosine_similarity(a, b)
    assert rho == pytest.approx(stats.spearmanr(cosines.numpy(), gold).statistic)
    assert error == pytest.approx((1 - rho**2) / math.sqrt(27))
    assert spearman(a, b, cosines.tolist())["spearman"][0] == pytest.approx(1)
    assert math.isnan(spearman(a, a * 0, gold)["spearman"][0])
    assert math.isnan(spearman(a, b, [1.0] * 30)["spearman"][0])


def test_pairs_are_read_with_and_without_a_head(tmp_path: Path) -> None:
    rows = 'a man,"a man, again",5.0\n , b,1\nc,d,2.5\ne,f,0\n'
    for name, head in (("plain", ""), ("headed", "sentence1,sentence2,score\n")):
        (tmp_path / name).write_text(head + rows)
        pairs = read_pairs(tmp_path / name)
        assert pairs == (["a man", "c", "e"], ["a man, again", "d", "f"], [5.0, 2.5, 0.0], 1)
    (tmp_path / "plain").write_text(rows + "g,h,1\n")
    assert read_pairs(tmp_path / "plain", limit=3).firsts == ["a man", "c", "e"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,1\nc,d\n", "line 2 is not sentence1,sentence2,score"),
        ("a,b,high\n", "line 1 is not sentence1,sentence2,score"),
        ("a,b,nan\n", "line 1 is not sentence1,sentence2,score"),
        ("a,b,1\n", "has 1 pairs: a correlation needs 3"),
        ("\udcff", "cannot be read as CSV in UTF-8"),
    ],
)
def test_other_layouts_are_reported_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "test.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        read_pairs(tmp_path / "test.csv")
    assert "\n" not in str(error.value)


def test_a_limit_that_leaves_too_few_pairs_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,b,1\nc,d,2\ne,f,3\n")
    with pytest.raises(UserError, match=r"^limit=2 leaves .* 2 pairs: a correlation needs 3"):
        read_pairs(tmp_path / "test.csv", limit=2)


def test_a_folder_has_one_test_split_and_perhaps_a_dev_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 files \*test\.csv, not one: its lines are sentence1"):
        find_pairs(tmp_path)
    (tmp_path / "some-test.csv").touch()
    assert find_pairs(tmp_path) == (tmp_path / "some-test.csv", None)
    (tmp_path / "some-dev.csv").touch()
    assert find_pairs(tmp_path) == (tmp_path / "some-test.csv", tmp_path / "some-dev.csv")
