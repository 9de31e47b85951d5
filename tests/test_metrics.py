"""Where numbers go: valid JSON lines, in order, once each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nanodisp.metrics import Metrics, WandbConfig, describe, drop_records_after


def metrics(folder: Path | None, step: int = -1) -> Metrics:
    """As a context: an open one, about to go on from `step`."""
    opened = Metrics(folder)
    opened.begin(config={}, wandb_config=WandbConfig(), step=step, total_steps=9)
    return opened


def test_a_record_is_a_line_of_json_without_nan(tmp_path: Path) -> None:
    with metrics(tmp_path) as m:
        m.record({"step": 1, "split": "train", "loss": math.nan, "lr": 0.5, "mfu": None})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there at once, not at the end
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "split": "train", "loss": None, "lr": 0.5, "mfu": None}
    ]


def test_going_on_drops_what_will_be_made_again(tmp_path: Path) -> None:
    with metrics(tmp_path) as m:
        for step in range(5):
            m.record({"step": step, "split": "val", "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "sp')
    with metrics(tmp_path, step=2) as m:
        m.record({"step": 3, "split": "val", "loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    drop_records_after(tmp_path / "metrics.jsonl", -1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_other_ranks_keep_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(None) as m:
        m.say("hello")
        m.record({"step": 1, "split": "train", "loss": 1.0})
        m.advance(1)
    assert capsys.readouterr().out == ""


def test_a_line_for_the_reader_leaves_out_what_is_not_there() -> None:
    line = describe({"step": 20, "split": "val", "loss": 1.23456, "bpb": None, "mean_cosine": [0.1, 0.25]}, 1000)
    assert line == "step   20/1000  val    loss 1.2346  mean cosine by layer 0.10 0.25"


def test_wandb_modes_are_three() -> None:
    with pytest.raises(ValueError, match="disabled, offline, online"):
        WandbConfig(mode="yes")


def test_what_ended_a_run_lies_in_its_folder_until_it_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), metrics(tmp_path):
        raise RuntimeError("out of memory")
    assert (tmp_path / "error.txt").read_text().splitlines()[-1] == "RuntimeError: out of memory"
    with pytest.raises(KeyboardInterrupt), metrics(tmp_path):
        raise KeyboardInterrupt  # a run that is stopped has not failed
    assert not (tmp_path / "error.txt").exists()
