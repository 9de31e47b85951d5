"""Reading runs back: whatever state their folders are in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import compose, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nanodisp.runs import read as runs
from nanodisp.runs.read import read_run, read_runs


def test_finished_unfinished_and_failed_are_told_apart(sweep: Path) -> None:
    runs = {run.folder.name: run for run in read_runs(sweep)}
    assert "notes" not in runs
    assert {name: run.status for name, run in runs.items() if run.status != "finished"} == {
        "disp1-s3": "unfinished",
        "nan": "failed",
        "raised": "failed",
        "damaged": "failed",
    }
    assert runs["disp1-s3"].problem == "at step 20 of 40"
    assert runs["nan"].problem == "the loss is not a number at step 0"
    assert runs["raised"].problem == "UserError: <b>no space</b> & more"
    assert "can not be read" in runs["damaged"].problem


def test_numbers_are_those_of_the_last_validation(sweep: Path) -> None:
    run = read_run(sweep / "disp0.1-s2")
    assert run.numbers["loss"] == pytest.approx(1.92)
    assert run.numbers["bpb"] == pytest.approx(3.84)
    assert run.numbers["mean_cosine"] == pytest.approx(0.34)
    assert run.numbers["rho"] == run.numbers["tau"] == pytest.approx(1)
    assert run.numbers["tokens_per_second"] == 4000, "the first lap, which warms up, does not count"
    np.testing.assert_array_equal(run.steps, [0, 20, 40])
    assert run.size == "10,960 (2 x 16)"


@settings(deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_read_as_far_as_it_goes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "cut"
    if not folder.exists():
        write_run(folder)
        (folder / "metrics.jsonl").rename(folder / "whole")
    text = (folder / "whole").read_text()
    cut = data.draw(st.integers(0, len(text)))
    (folder / "metrics.jsonl").write_text(text[:cut])
    run = read_run(folder)
    whole_lines = [line for line in text.splitlines() if line in text[:cut]]
    assert run.status == ("finished" if cut >= len(text) - 1 else "unfinished")
    assert run.step == max((json.loads(line)["step"] for line in whole_lines), default=0)
    assert bool(run.numbers) == bool(whole_lines)


def test_a_real_run_is_finished_and_its_command_makes_it_again(run: Callable[..., Path]) -> None:
    folder = run("train.steps=2", "train.sample_tokens=0", "dispersion.layers=[1,2]", "wandb.tags=['a b']", "seed=3")
    read = read_run(folder)
    assert (read.status, read.step, read.total_steps) == ("finished", 2, 2)
    program, script, *overrides = shlex.split(runs.command_of(read, runs.default_config()))
    assert (program, script) == ("python", "train.py")
    assert OmegaConf.structured(compose(*overrides)) == OmegaConf.load(folder / "config.yaml")


@settings(deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12))
def test_any_value_survives_the_command_line(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"key={runs.hydra_value(value)}"])
    assert override.value() == value


def test_the_course_of_condensation_is_finer_than_the_validations(run: Callable[..., Path]) -> None:
    folder = run("train.steps=4", "train.eval_interval=4", "train.condensation_interval=1", "train.sample_tokens=0")
    read = read_run(folder)
    np.testing.assert_array_equal(read.steps, [0, 4])
    np.testing.assert_array_equal(read.course_steps, range(5))
    np.testing.assert_allclose(read.course[[0, 4]], read.cosines, rtol=1e-4)  # here both look at the same windows
