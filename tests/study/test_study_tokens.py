"""The loss by the frequency of the predicted token, and by what its context holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records
from hypothesis import given
from hypothesis import strategies as st

from bench.study import tokens
from bench.study.pairs import arms_of
from bench.study.report import by_token, of_tokens, over_steps
from nanodisp.data.shards import open_split
from nanodisp.hf.open import open_run


def test_the_loss_of_each_stratum_is_that_of_its_tokens(run: Callable[..., Path], corpus: Path) -> None:
    folder = run("train.steps=8", "train.eval_windows=null", "train.checkpoint_interval=4", "train.keep_every=4")
    tokens.main(folder)
    found = tokens.read(folder)["by_frequency"]

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
    loss = records(folder, "val")[-1]["loss"]
    assert np.bincount(mine) / n @ found == pytest.approx(loss, rel=1e-5)
    context = tokens.read(folder)["by_context"]
    assert np.dot(context["shares"], context["losses"]) == pytest.approx(loss, rel=1e-5)
    assert all(share > 0 for share in context["shares"])
    (at_4, *losses_4), (at_8, *losses_8) = tokens.read(folder)["context_over_steps"]
    assert (at_4, at_8) == (4, 8) and losses_8 == context["losses"]
    assert np.dot(context["shares"], losses_4) > 1.01 * loss, "it has learned from step 4 to 8"


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_a_token_is_copied_seen_or_new(row: list[int]) -> None:
    inputs, targets = torch.tensor([row[:-1]]), torch.tensor([row[1:]])
    expected = []
    for i, target in enumerate(row[1:]):
        earlier = [j for j in range(i) if row[j] == row[i]]
        copied = bool(earlier) and row[earlier[-1] + 1] == target
        expected.append(0 if copied else 1 if target in row[: i + 1] else 2)
    assert tokens.contexts_of(inputs, targets).tolist() == [expected]


def test_the_table_has_the_differences_of_each_stratum_and_of_measured_runs_alone() -> None:
    runs = [
        {"name": f"a-77k-lam{lam}-s{seed}", "by_frequency": [q + seed + (lam == "0.1") * q / 10 for q in range(4)]}
        for lam in ("0", "0.1")
        for seed in range(3)
    ]
    every = [*runs, {"name": "a-77k-lam0.1-s9"}]
    lines = [*by_token("frequency", "abcd", [arms_of(every, tokens.of_group("by_frequency", q)) for q in range(4)])]
    cells = lines[-1].split(" | ")
    assert cells[:2] == ["| a-77k-lam0.1", "3"]
    assert lines[-2] == "| a-77k-lam0: the loss itself | 3 runs | 1.0000 | 2.0000 | 3.0000 | 4.0000 |"
    assert [cell.split(" [")[0] for cell in cells[2:]] == ["+0.0000", "+0.1000", "+0.2000", "+0.3000"]
    assert "Not known yet" in [*by_token("frequency", "abcd", [{}] * 4)][-1]
    context = [{**run, "by_context": {"losses": run["by_frequency"][:3], "shares": [0.1, 0.2, 0.7]}} for run in runs]
    lines = [*of_tokens(context)]
    assert "| arm | pairs | copied (10.0% of the text) | seen (20.0% of the text) | new (70.0% of the text) |" in lines
    assert any(line.startswith("| a-77k-lam0.1 | 3 | +0.0000 ") and line.count("|") == 6 for line in lines)
    assert "| a-77k-lam0.1, times the share | 3 | +0.0000 | +0.0200 | +0.1400 |" in lines


def test_the_losses_over_steps_are_compared_at_each_checkpoint_of_pairs_that_have_several() -> None:
    runs = [
        {
            "name": f"a-1.19M-lam{lam}-s{seed}",
            "loss": 3.0,
            "context_over_steps": [[500, 5.0, 4, 5], [1000, copied, 4, 5]],
        }
        for seed in range(3)
        for lam, copied in (("0", 2.0 + seed), ("0.1", 2.5 + seed))
    ]
    lines = [*over_steps([*runs, {"name": "a-77k-lam0.1-s1", "loss": 3.0, "context_over_steps": [[9, 1, 2, 3]]}])]
    assert [line[:45] for line in lines[-2:]] == [
        "| a-1.19M-lam0.1 | 500 | 3 | 5.0000, +0.0000 ",
        "| a-1.19M-lam0.1 | 1,000 | 3 | 3.0000, +0.500",
    ]
    assert "77k" not in "".join(lines)
    assert "Not known yet" in [*over_steps(runs[:1])][-1]
