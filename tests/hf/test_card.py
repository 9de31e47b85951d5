"""The card of an exported run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import records

from nanodisp.hf.card import model_card
from nanodisp.runs import checkpoint

Run = Callable[..., Path]


def test_a_model_card_describes_the_run_and_names_no_local_path(run: Run, tmp_path: Path) -> None:
    start = run("train.steps=1", "train.sample_tokens=0", name="start")
    settings = (f"init_from={start}", f"intervention.teacher={start}")
    folder = run("train.steps=2", "train.sample_tokens=0", *settings, name="described")
    card = model_card(checkpoint.load(checkpoint.find(folder)), "gpt2", None)
    loss = records(folder, "val")[-1]["loss"]
    for words in ("# described", "2 steps", "128 tokens", "validation at step 2", f"{loss:.4f}", "lambda_disp: 0.1"):
        assert words in card
    assert "init_from: start" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "line",
    [
        *(
            "123",
            '"x"',
            "[]",
            "{}",
            "[" * 100_000,
            '{"split": "val", "step": "x"}',
            '{"split": "val", "step": Infinity}',
        ),
        *('{"split": "val", "step": 2, "mean_cosine": null}', '{"split": "val", "step": 2, "loss": "x"}'),
    ],
    ids=lambda line: line[:40],
)
def test_damaged_records_do_not_prevent_a_card(run: Run, line: str) -> None:
    folder = run("train.steps=1", "train.sample_tokens=0")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line[:100_001] + "\n")
    assert "# run" in model_card(checkpoint.load(checkpoint.find(folder)), "gpt2", None)
