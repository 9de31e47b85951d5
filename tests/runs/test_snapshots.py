"""Snapshots: what they hold, when they are taken, and that training does not notice them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import TINY, compose, records, weights

from nanodisp.data.corpus import open_corpus
from nanodisp.errors import UserError
from nanodisp.hf.open import open_run
from nanodisp.runs import snapshots

Run = Callable[..., Path]
SETTINGS = ("train.steps=10", "train.checkpoint_interval=5", "train.eval_interval=5", "train.log_interval=1")
OFTEN = (*SETTINGS, "train.snapshot_interval=4")


def test_a_snapshot_is_what_the_layers_make_of_the_first_validation_tokens(run: Run, corpus: Path) -> None:
    folder = run(*OFTEN)
    taken = snapshots.read(folder)
    assert taken.steps == (0, 1, 2, 4, 8, 10), "powers of two, multiples, and the last step"
    tokens = open_corpus(corpus, "byte").val.read(0, 16)
    assert taken.tokens.tolist() == tokens.tolist()
    model = open_run(str(folder)).model
    with torch.inference_mode():
        states = torch.cat(list(model.hidden_states(torch.from_numpy(tokens.astype(np.int64))[None]))).numpy()
    assert taken.shape == states.shape == (3, 16, 16)
    assert taken.hidden(10) == pytest.approx(states, rel=1e-3, abs=1e-5)
    assert np.abs(taken.hidden(10) - taken.hidden(0)).max() > 0.01
    assert taken.hidden(0).dtype == np.float32


def test_the_text_does_not_depend_on_how_many_windows_are_validated(run: Run) -> None:
    few, many = run(*OFTEN, name="few"), run(*OFTEN, "train.eval_windows=3", name="many")
    assert np.array_equal(snapshots.read(few).hidden(10), snapshots.read(many).hidden(10))


@pytest.mark.parametrize("options", [(), ("model.dropout=0.1",), ("model.causal=false",)], ids=str)
def test_training_does_not_notice_snapshots(run: Run, options: tuple[str, ...]) -> None:
    plain, watched = run(*SETTINGS, *options, name="plain"), run(*OFTEN, *options, name="watched")
    lines = [records(folder, "train") + records(folder, "val") for folder in (plain, watched)]
    for line in lines[0] + lines[1]:
        line.pop("seconds"), line.pop("tokens_per_second", None)
    assert lines[0] == lines[1]
    ours, theirs = weights(plain), weights(watched)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not (plain / "snapshots").exists()


def test_a_resumed_run_takes_the_snapshots_after_its_checkpoint_again(run: Run) -> None:
    folder = run(*OFTEN)
    files = snapshots.all_snapshots(folder / "snapshots")
    before = {path.name: path.read_bytes() for path in files}
    shutil.rmtree(folder / "checkpoints" / "step_00000010")  # as if it had been killed after step 5
    files[-2].write_bytes(b"cut short")
    (folder / "snapshots" / "step_00000007.safetensors").write_bytes(files[0].read_bytes())  # of another interval
    run(*OFTEN)
    assert {path.name: path.read_bytes() for path in snapshots.all_snapshots(folder / "snapshots")} == before


def test_a_run_that_begins_again_drops_the_snapshots_of_before(run: Run) -> None:
    folder = run(*OFTEN)
    shutil.rmtree(folder / "checkpoints")
    run(*SETTINGS, "train.snapshot_interval=5")
    assert snapshots.read(folder).steps == (0, 1, 2, 4, 5, 10)


def test_the_interval_is_no_part_of_what_a_run_is() -> None:
    assert compose(*TINY, "data.path=x", "train.snapshot_interval=5").run_name == (
        compose(*TINY, "data.path=x").run_name
    )
    with pytest.raises(UserError, match=r"train.snapshot_interval=0 must be positive, or null"):
        compose(*TINY, "data.path=x", "train.snapshot_interval=0")


def test_values_beyond_float16_keep_their_layers_scale(tmp_path: Path) -> None:
    hidden = torch.randn(3, 6, 4)
    hidden[1] *= 1e7
    hidden[2] = 0
    path = snapshots.write(tmp_path / "snapshots", 3, torch.arange(6), hidden)
    assert path.name == "step_00000003.safetensors"
    assert snapshots.read(tmp_path).hidden(3) == pytest.approx(hidden.numpy(), rel=1e-3, abs=1e-6)


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    good, bad = torch.randn(2, 6, 4), torch.full((2, 6, 4), torch.nan)
    snapshots.write(tmp_path / "snapshots", 2, torch.arange(6), bad)
    with pytest.raises(UserError, match="not finite: the run diverged"):
        snapshots.read(tmp_path)
    snapshots.write(tmp_path / "snapshots", 1, torch.arange(6), good)
    assert snapshots.read(tmp_path).steps == (1,)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no snapshots: add train\.snapshot_interval=50 run_name=<new>"):
        snapshots.read(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        snapshots.read(tmp_path / "missing")
    path = snapshots.write(tmp_path / "snapshots", 0, torch.arange(6), torch.randn(2, 6, 4))
    snapshots.write(tmp_path / "snapshots", 1, torch.arange(6), torch.randn(3, 6, 4))
    with pytest.raises(UserError, match="is of another text or model than step_00000000"):
        snapshots.read(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"step_00000000\.safetensors cannot be read"):
        snapshots.read(tmp_path)


def test_runs_are_compared_at_the_steps_that_both_have(tmp_path: Path) -> None:
    def run_of(name: str, steps: tuple[int, ...], first: int = 0) -> snapshots.Snapshots:
        for step in steps:
            snapshots.write(tmp_path / name / "snapshots", step, torch.arange(first, first + 6), torch.randn(2, 6, 4))
        return snapshots.read(tmp_path / name)

    a, b, c = run_of("a", (0, 10, 20)), run_of("b", (0, 20, 30)), run_of("c", (5,))
    assert snapshots.common_steps([a, b]) == [0, 20]
    with pytest.raises(UserError, match="no step in common"):
        snapshots.common_steps([a, c])
    with pytest.raises(UserError, match="different texts"):
        snapshots.common_steps([a, run_of("d", (0,), first=1)])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_take_the_snapshots_of_one_process(run: Run, corpus: Path, tmp_path: Path, parallel: str) -> None:
    one = run(*OFTEN)
    settings = (*TINY, *OFTEN, f"data.path={corpus}", f"out_dir={tmp_path}", "run_name=two")
    result = forked.train(*settings, f"train.parallel={parallel}", "train.timeout_minutes=1", ranks=2)
    assert result.returncode == 0, result.stderr
    ours, theirs = snapshots.read(one), snapshots.read(tmp_path / "two")
    assert ours.steps == theirs.steps
    for step in ours.steps:
        assert ours.hidden(step) == pytest.approx(theirs.hidden(step), rel=2e-3, abs=2e-3)
