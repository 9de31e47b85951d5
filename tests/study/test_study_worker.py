"""The queue of the study: which jobs a worker takes, how long it runs, and what it records of runs that diverge."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.study import records, worker
from bench.study.records import final_loss, known_losses, write_records
from bench.study.report import compared_runs, page
from bench.study.worker import call, chosen, work
from nanodisp.errors import UserError


@pytest.mark.slow
def test_a_worker_takes_the_jobs_whose_names_begin_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(os, "nice", lambda _: 0)
    monkeypatch.setattr(worker, "call", lambda command, *_: taken.append(command[-1]) or 1)  # each fails
    monkeypatch.setattr(records, "RECORDS", tmp_path)  # nothing is done yet
    work(tmp_path, tmp_path, None, only=("lr-77k", "lr-150k"))
    names = [each.removeprefix("run_name=") for each in taken]
    assert {name[: name.index("k") + 1] for name in names} == {"lr-77k", "lr-150k"}
    assert len(set(names)) == len(names)


def test_a_whole_name_chooses_one_run_and_a_beginning_all_that_have_it() -> None:
    names = {"a-77k-lam0-s1", "a-77k-lam0-s10", "a-77k-lam0.1-s1", "b-77k-5x-lam0-s1"}
    assert chosen(names, ["a-77k-lam0-s1"]) == {"a-77k-lam0-s1"}
    assert chosen(names, ["a-77k-lam0-s1", "b"]) == {"a-77k-lam0-s1", "b-77k-5x-lam0-s1"}
    assert chosen(names, ["a-77k-lam0-s"]) == {"a-77k-lam0-s1", "a-77k-lam0-s10"}
    assert chosen(names, [""]) == names and chosen(names, ["c"]) == set()


@pytest.mark.slow
def test_a_run_is_asked_to_stop_when_the_time_is_over(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert call(["-c", "print('begun', flush=True); import time; time.sleep(60)"], log, time.monotonic() + 1) == -15
    assert call(["-c", "print('ended')"], log) == 0
    assert log.read_text().endswith("ended\n")


def test_a_run_that_diverges_is_recorded_counted_and_not_run_again(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    with pytest.raises(UserError, match="not finite"):
        run("optim.lr=1e30", "train.steps=9", "train.max_bad_steps=2", name="a-77k-lam0-s2")
    done = run("train.steps=null", "train.tokens=200", name="a-77k-lam0-s1")
    for folder in (done, tmp_path / "a-77k-lam0-s2"):
        (folder / "machine.json").write_text('{"machine": "cpu", "torch": "2", "code": "0"}')
    (tmp_path / "a-77k-lam0-s3").mkdir()  # has not begun
    finished = final_loss(done)
    assert finished is not None and math.isfinite(finished)
    assert known_losses(tmp_path) == {"a-77k-lam0-s1": finished, "a-77k-lam0-s2": math.inf}
    write_records(tmp_path)
    written = {each["name"]: each for each in compared_runs(tmp_path / "records")}
    assert {name: each["loss"] for name, each in written.items()} == {"a-77k-lam0-s1": finished, "a-77k-lam0-s2": None}
    assert str(tmp_path) not in json.dumps(written)
    assert known_losses(tmp_path / "elsewhere") == known_losses(tmp_path)
    assert "1 runs beside the search for learning rates: (a) 1. 1 others\nfailed" in page([*written.values()])
