"""The loss by the frequency of the predicted token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records

from bench.study_frequency import losses_by_frequency
from bench.study_report import by_frequency, loss_of
from bench.study_statistics import arms_of
from nanodisp.data.shards import open_split
from nanodisp.hf.open import open_run


def test_the_loss_of_each_stratum_is_that_of_its_tokens(run: Callable[..., Path], corpus: Path) -> None:
    folder = run("train.steps=8", "train.eval_windows=null")
    found = losses_by_frequency(folder)

    text = open_split(corpus, "val").read(0, 1000)
    model, size = open_run(str(folder)).model, 16
    n = (len(text) - 1) // size * size
    idx, targets = (torch.from_numpy(text[i : n + i].astype(np.int64)).view(-1, size) for i in (0, 1))
    with torch.no_grad():
        surprise = -model(idx).logits.log_softmax(-1).gather(-1, targets[..., None]).flatten().numpy()
    counts = np.bincount(targets.flatten(), minlength=256)
    rank = np.argsort(-counts, kind="stable")
    middle = (np.cumsum(counts[rank]) - counts[rank] / 2) / n
    quarter = np.empty(len(rank), int)
    quarter[rank] = np.minimum(3, middle * 4)
    mine = quarter[targets.flatten().numpy()]
    assert found == pytest.approx([surprise[mine == q].mean() for q in range(4)], rel=1e-5)
    share = np.bincount(mine) / n
    assert share @ found == pytest.approx(records(folder, "val")[-1]["loss"], rel=1e-5)


def test_the_table_has_the_differences_of_each_stratum_and_of_measured_runs_alone() -> None:
    runs = [
        {"name": f"a-77k-lam{lam}-s{seed}", "by_frequency": [q + seed + (lam == "0.1") * q / 10 for q in range(4)]}
        for lam in ("0", "0.1")
        for seed in range(3)
    ]
    lines = [*by_frequency([arms_of([*runs, {"name": "a-77k-lam0.1-s9"}], loss_of(q)) for q in range(4)])]
    cells = lines[-1].split(" | ")
    assert cells[:2] == ["| a-77k-lam0.1", "3"]
    assert [cell.split(" [")[0] for cell in cells[2:]] == ["+0.0000", "+0.1000", "+0.2000", "+0.3000"]
    assert "Not known yet" in [*by_frequency([{}] * 4)][-1]
