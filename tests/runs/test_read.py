"""Reading runs from their folders, whatever state these are in."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from conftest import TINY, compose, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nanodisp.config import ADDED
from nanodisp.runs.read import differences, read_run, read_runs


def test_finished_unfinished_and_failed_runs_are_distinguished(sweep: Path) -> None:
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
    assert "cannot be read" in runs["damaged"].problem


def test_numbers_are_from_the_last_validation(sweep: Path) -> None:
    run = read_run(sweep / "disp0.1-s2")
    assert run.numbers["loss"] == pytest.approx(1.92)
    assert run.numbers["bpb"] == pytest.approx(3.84)
    assert run.numbers["mean_cosine"] == pytest.approx(0.34)
    assert run.numbers["rho"] == run.numbers["tau"] == pytest.approx(1)
    assert run.numbers["tokens_per_second"] == 4000, "the first record, which includes warm-up, does not count"
    np.testing.assert_array_equal(run.steps, [0, 20, 40])
    assert run.size == "10,960 (2 x 16)"


def test_a_run_of_version_0_1_0_had_what_the_defaults_of_later_keys_are(tmp_path: Path) -> None:
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new", "dispersion.lambda_disp=0")
    config = OmegaConf.load(old / "config.yaml")
    for key in ADDED:
        section, name = key.split(".")
        del config[section][name]
    OmegaConf.save(config, old / "config.yaml")
    runs = [read_run(old), read_run(new)]
    assert list(differences(runs)) == ["dispersion.lambda_disp"]
    assert runs[0].architecture == "GPT-2"


def test_an_encoders_loss_is_read_under_its_own_name(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "model.causal=false", loss=1.5))
    assert (run.status, run.loss_name, run.numbers["masked_loss"]) == ("finished", "masked_loss", 1.5)
    assert "loss" not in run.numbers and run.numbers["bpb"] is None
    assert [part.tolist() for part in run.losses["val"]] == [[0, 20, 40], [1.5] * 3]


@pytest.mark.slow
@settings(deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_read_up_to_the_cut(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "cut"
    if not folder.exists():
        write_run(folder)
        (folder / "metrics.jsonl").rename(folder / "complete")
    text = (folder / "complete").read_text()
    cut = data.draw(st.integers(0, len(text)))
    (folder / "metrics.jsonl").write_text(text[:cut])
    run = read_run(folder)
    complete_lines = [line for line in text.splitlines() if line in text[:cut]]
    assert run.status == ("finished" if cut >= len(text) - 1 else "unfinished")
    assert run.step == max((json.loads(line)["step"] for line in complete_lines), default=0)
    assert bool(run.numbers) == bool(complete_lines)


@pytest.mark.slow
def test_a_run_of_a_sweep_keeps_the_command_that_reproduces_it(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    settings = ("train.steps=2", "train.sample_tokens=0", "dispersion.layers=[1,2]", f"out_dir={folder}", "seed=3,4")
    result = forked.train(*TINY, f"data.path={corpus}", *settings, "-m", "run_name=${seed}")
    assert result.returncode == 0, result.stderr
    read = read_run(folder / "4")
    assert (read.status, read.step, read.total_steps) == ("finished", 2, 2)
    program, script, *overrides = shlex.split(read.config["command"])
    assert (program, script) == ("python", "train.py")
    assert "seed=4" in overrides
    again: Any = json.loads(json.dumps(dataclasses.asdict(compose(*overrides))))
    before: Any = OmegaConf.to_container(OmegaConf.load(folder / "4" / "config.yaml"))
    for section, key in (("model", "vocab_size"), ("data", "tokenizer"), ("train", "compile")):  # resolved by the run
        again[section].pop(key), before[section].pop(key)
    assert {**again, "command": read.config["command"]} == before


def test_the_trajectory_of_condensation_is_finer_than_the_validations(run: Callable[..., Path]) -> None:
    settings = ("train.steps=4", "train.eval_interval=4", "train.condensation_interval=1", "train.sample_tokens=0")
    read = read_run(run(*settings, "train.eval_windows=4"))
    np.testing.assert_array_equal(read.steps, [0, 4])
    np.testing.assert_array_equal(read.trajectory_steps, range(5))
    np.testing.assert_allclose(read.trajectory[[0, 4]], read.cosines, rtol=1e-4)  # both on the same 4 windows
