"""Checkpoints: what is saved comes back, and what is not whole is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodisp import checkpoint
from nanodisp.errors import UserError

MODEL = {"wte.weight": torch.randn(4, 3), "half": torch.randn(2).bfloat16()}
OPTIMIZER = {"wte.weight/step": torch.tensor(3.0), "wte.weight/exp_avg": torch.randn(4, 3)}


def save(folder: Path, step: int = 7) -> Path:
    return checkpoint.save(folder, MODEL, OPTIMIZER, {"step": step, "tokens": 100})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    loaded = checkpoint.load(save(tmp_path))
    for saved, back in ((MODEL, loaded.model), (OPTIMIZER, loaded.optimizer)):
        assert saved.keys() == back.keys()
        assert all(torch.equal(saved[key], back[key]) and saved[key].dtype == back[key].dtype for key in saved)
    assert (loaded.step, loaded.state["tokens"]) == (7, 100)


def test_saving_leaves_nothing_but_whole_checkpoints_and_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    (tmp_path / ".step_00000007.tmp").mkdir()  # a save that was killed
    (tmp_path / ".step_00000007.tmp" / "rest").touch()
    save(tmp_path)
    save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000007"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["step_00000020", "step_00000100"]


def test_find_takes_a_run_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 8)
    save(tmp_path / "checkpoints", 3)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == checkpoint.find(path) == path
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*checkpoint.TENSOR_FILES, "state.json"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255)
)
def test_a_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, name: str, at: float, flip: int) -> None:
    path = save(tmp_path_factory.mktemp("run"))
    content = bytearray((path / name).read_bytes())
    content[int(at * len(content))] ^= flip
    (path / name).write_bytes(content)
    if name == "state.json":  # JSON has slack (white space, another number): no crash, and never other tensors
        try:
            loaded = checkpoint.load(path)
        except UserError:
            return
        assert torch.equal(loaded.model["wte.weight"], MODEL["wte.weight"])
    else:
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("name", [*checkpoint.TENSOR_FILES, "state.json"])
def test_a_truncated_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path)
    (path / name).write_bytes((path / name).read_bytes()[:-9])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checkpoint.load(path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(UserError, match="format version 1"):
        checkpoint.load(path)


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not save"):
        save(tmp_path / "file")
