"""Checkpoints: what is saved is loaded, and what is not intact is rejected."""

from __future__ import annotations

import hashlib
import json
import os
import pickle  # noqa: TID251 - to attack with
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodisp.errors import UserError
from nanodisp.runs import checkpoint

MODEL = {"wte.weight": torch.randn(4, 3), "half": torch.randn(2).bfloat16()}
OPTIMIZER = {"wte.weight/step": torch.tensor(3.0), "wte.weight/exp_avg": torch.randn(4, 3)}


def save(folder: Path, step: int = 7) -> Path:
    return checkpoint.save(folder, MODEL, OPTIMIZER, {"step": step, "tokens": 100})


def test_a_loaded_checkpoint_is_the_saved_one(tmp_path: Path) -> None:
    loaded = checkpoint.load(save(tmp_path))
    for saved, back in ((MODEL, loaded.model), (OPTIMIZER, loaded.optimizer)):
        assert saved.keys() == back.keys()
        assert all(torch.equal(saved[key], back[key]) and saved[key].dtype == back[key].dtype for key in saved)
    assert (loaded.step, loaded.state["tokens"]) == (7, 100)


def test_saving_leaves_only_complete_checkpoints_and_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    (tmp_path / ".step_00000007.tmp").mkdir()  # a save that was killed
    (tmp_path / ".step_00000007.tmp" / "rest").touch()
    save(tmp_path)
    save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000007"]


def test_every_file_is_on_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []

    def flush(path: Path) -> None:
        flushed.append((path.name, checkpoint.path_of(tmp_path, 7).exists()))

    monkeypatch.setattr(checkpoint, "flush", flush)
    save(tmp_path)
    before = {name for name, named in flushed if not named}
    assert before == {"model.safetensors", "optimizer.safetensors", "state.json", ".step_00000007.tmp"}
    assert flushed[-1] == (tmp_path.name, True), "then the rename itself"


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["step_00000020", "step_00000100"]


def test_prune_keeps_the_best_and_the_multiples_of_keep_every(tmp_path: Path) -> None:
    losses = {5: float("nan"), 10: 3.0, 20: 1.0, 30: None, 40: 2.0, 60: 2.5}
    for step, loss in losses.items():
        checkpoint.save(tmp_path, MODEL, OPTIMIZER, {"step": step, "val_loss": loss})
    checkpoint.prune(tmp_path, keep_last=1, keep_every=30)
    assert [int(p.name[5:]) for p in checkpoint.all_checkpoints(tmp_path)] == [20, 30, 60]


def test_a_background_save_holds_the_tensors_of_the_moment_it_was_requested(tmp_path: Path) -> None:
    model = {name: tensor.clone() for name, tensor in MODEL.items()}
    saver = checkpoint.Saver(tmp_path, keep_last=5, keep_every=None)
    for step in range(4):
        saver.save(model, OPTIMIZER, {"step": step})
        for tensor in model.values():
            tensor.fill_(step)  # training continues
    saver.wait()
    for step in range(1, 4):
        saved = checkpoint.load(checkpoint.path_of(tmp_path, step))
        assert all((tensor == step - 1).all() for tensor in saved.model.values())


def test_a_background_save_prunes(tmp_path: Path) -> None:
    with checkpoint.Saver(tmp_path, keep_last=2, keep_every=None) as saver:
        for step in range(4):
            saver.save(MODEL, OPTIMIZER, {"step": step})
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_a_failed_save_is_reported_beside_the_error_that_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZeroDivisionError), checkpoint.Saver(tmp_path / "file", keep_last=2, keep_every=None) as saver:
        saver.save(MODEL, OPTIMIZER, {"step": 1})
        raise ZeroDivisionError
    assert "error: could not save the checkpoint" in capsys.readouterr().err


def test_an_error_in_the_background_is_raised_in_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saver = checkpoint.Saver(tmp_path / "file", keep_last=1, keep_every=None)
    saver.save(MODEL, OPTIMIZER, {"step": 1})
    with pytest.raises(UserError, match="could not save"):
        saver.wait()
    saver.wait()  # it is raised once


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    (paths[2] / "state.json").write_text("[" * 100_000)
    (paths[1] / "model.safetensors").write_bytes(b"")
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert capsys.readouterr().err.count("falling back to step 1") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"step_00000001", "damaged_step_00000002", "damaged_step_00000003"}


def test_without_any_intact_checkpoint_nothing_is_changed(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is intact \(.*damaged.*\); restore .* or delete"
    ) as error:
        checkpoint.load_newest(tmp_path)
    assert "falls back" not in str(error.value), "there is nothing left to fall back to"
    assert path.exists()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000))
def test_a_disk_that_fills_up_at_any_byte_leaves_the_previous_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1)
    larger = {**MODEL, "wpe.weight": torch.zeros(600)}  # model 2.6 kB, optimizer 0.3, state 0.3
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        checkpoint.save(folder, larger, OPTIMIZER, {"step": 2})
        full = False
    except UserError as error:
        assert "Earlier checkpoints are intact; free some space" in str(error)
        full = True
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in folder.iterdir() if full] == (["step_00000001"] if full else [])
    newest = checkpoint.load_newest(folder)
    assert newest is not None
    assert newest.step == (1 if full else 2)


def test_a_pickle_in_any_file_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    for name in (*checkpoint.TENSOR_FILES, "state.json"):
        path = save(tmp_path / name)
        (path / name).write_bytes(pickle.dumps(Bomb()))
        sha256 = {file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in checkpoint.TENSOR_FILES}
        if name != "state.json":  # with the right checksums, as an attacker would have them
            state = {"format_version": checkpoint.FORMAT_VERSION, "step": 7}
            sha256["state.json"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
            (path / "state.json").write_text(json.dumps({**state, "sha256": sha256}))
        with pytest.raises(UserError):
            checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_find_accepts_a_run_its_checkpoints_folder_or_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 8)
    save(tmp_path / "checkpoints", 3)
    save(tmp_path / "checkpoints", 5)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == checkpoint.find(path) == path
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")


def test_a_step_or_the_lowest_validation_loss_is_found_by_name(tmp_path: Path) -> None:
    for step, loss in {5: 3.0, 10: 1.0, 20: 2.0, 30: None}.items():
        checkpoint.save(tmp_path / "checkpoints", MODEL, OPTIMIZER, {"step": step, "val_loss": loss})
    found = {name: checkpoint.find(Path(f"{tmp_path}@{name}")).name for name in ("best", "5", "00000030")}
    assert found == {"best": "step_00000010", "5": "step_00000005", "00000030": "step_00000030"}
    assert checkpoint.find(Path(f"{tmp_path}/checkpoints@20")).name == "step_00000020"
    for name in ("7", "bset", ""):
        with pytest.raises(UserError, match=rf"has checkpoints of steps 5, 10, 20, 30, and @{name} is not one"):
            checkpoint.find(Path(f"{tmp_path}@{name}"))
    with pytest.raises(UserError, match=r"nowhere@best holds no checkpoint: give .*out/<run>@best"):
        checkpoint.find(Path("nowhere@best"))


def test_without_a_validation_loss_there_is_no_best(tmp_path: Path) -> None:
    save(tmp_path, 8)
    with pytest.raises(UserError, match="has checkpoints of steps 8, and none has a validation loss"):
        checkpoint.find(Path(f"{tmp_path}@best"))


def test_an_at_sign_may_be_part_of_a_folders_name(tmp_path: Path) -> None:
    save(tmp_path / "run@3", 8)
    assert checkpoint.find(tmp_path / "run@3").name == "step_00000008"


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o026)
    try:
        path = save(tmp_path)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == dict.fromkeys(
        (*checkpoint.TENSOR_FILES, "state.json"), "0o640"
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*checkpoint.TENSOR_FILES, "state.json"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255)
)
def test_a_changed_byte_is_detected(tmp_path_factory: pytest.TempPathFactory, name: str, at: float, flip: int) -> None:
    path = save(tmp_path_factory.mktemp("run"))
    content = bytearray((path / name).read_bytes())
    content[int(at * len(content))] ^= flip
    (path / name).write_bytes(content)
    if name == "state.json":  # a change of white space changes no value
        try:
            loaded = checkpoint.load(path)
        except UserError:
            return
        assert torch.equal(loaded.model["wte.weight"], MODEL["wte.weight"])
        assert (loaded.step, loaded.state["tokens"]) == (7, 100)
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


def test_another_format_version_is_rejected(tmp_path: Path) -> None:
    path = save(tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        checkpoint.load(path)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not save"):
        save(tmp_path / "file")
