"""Linear probes find what is linear, and nothing in noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nanodisp.errors import UserError
from nanodisp.evaluate.probes import class_files, probe, read_classes

pytest.importorskip("sklearn")


def test_a_layer_that_holds_the_class_is_told_from_one_that_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [0] * 100 + [1] * 100
    noise = torch.randn(2, 200, 60, generator=generator)
    noise[1, 100:, 7] += 8  # layer 1: along one of the features
    noise[:, :, 3] = noise[:, :, 3] * 1e4 + 1e5  # a massive one, which scaling has to undo
    found = probe(noise, labels, seed=1)
    assert found.shape == (2, 5)
    assert 0.3 < found[0].mean() < 0.7, "noise that was not trained on"
    assert found[1].mean() > 0.97


def test_the_seed_decides_the_folds() -> None:
    vectors = torch.randn(1, 60, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (probe(vectors, [0, 1, 2] * 20, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_file_is_a_class_and_a_line_a_text(tmp_path: Path) -> None:
    (tmp_path / "b.neg").write_text("bad\n\nworse \n1\n2\n3\u20284\n")
    (tmp_path / "a.pos").write_text("good\nbetter\n1\n2\n3")
    for name in ("README.txt", ".hidden", "table.csv"):
        (tmp_path / name).write_text("x\n" * 9)
    assert [file.name for file in class_files(tmp_path)] == ["a.pos", "b.neg"]
    data = read_classes(tmp_path)
    assert data.texts == ["good", "better", "1", "2", "3", "bad", "worse", "1", "2", "3\u20284"]
    assert data.labels == [0] * 5 + [1] * 5
    assert (data.names, data.n_empty) == (["a.pos", "b.neg"], 1)
    (tmp_path / "a.pos").write_text("text\n" * 9)
    assert read_classes(tmp_path, limit=5).labels == [0] * 5 + [1] * 5


def test_other_layouts_are_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("text\n" * 9)
    with pytest.raises(UserError, match="has 1 classes, not at least 2: a folder of classes has a file for each class"):
        read_classes(tmp_path)
    (tmp_path / "two").write_text("text\n" * 4)
    with pytest.raises(UserError, match="two has 4 texts: 5 folds need as many"):
        read_classes(tmp_path)
    with pytest.raises(UserError, match=r"^limit=3 leaves .*one 3 texts: 5 folds need as many"):
        read_classes(tmp_path, limit=3)
    (tmp_path / "two").write_bytes(b"\xff\n" * 9)
    with pytest.raises(UserError, match="two cannot be read as UTF-8"):
        read_classes(tmp_path)
