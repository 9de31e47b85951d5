"""Checkpoints: save, find, load, prune. Atomic, checked, and free of pickle.

A checkpoint is a folder `step_00000500` of three files: `model.safetensors`,
`optimizer.safetensors` and `state.json` (format version, step, whatever the run adds, and
the sha256 of the other two). It is written under a temporary name, flushed to disk and
renamed, so that a folder of the right name is whole. Loading one runs no code of its author.

There is no random state in it: everything random in a run is drawn from (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nanodisp.errors import UserError

FORMAT_VERSION = 1
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
REMEDY = "delete that checkpoint to go on from the one before"


@dataclass
class Checkpoint:
    """What a checkpoint holds: tensors by name (on the CPU) and the state beside them."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


def save(folder: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write a checkpoint of `state["step"]` into `folder` and return its path.

    Raises UserError when the disk is full or can not be written.
    """
    path = folder / f"step_{state['step']:08d}"
    temporary = folder / f".{path.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        sha256 = {}
        for name, tensors in zip(TENSOR_FILES, (model, optimizer), strict=True):
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, temporary / name)
            sha256[name] = _sha256(temporary / name)
        text = json.dumps({"format_version": FORMAT_VERSION, **state, "sha256": sha256}, indent=2)
        (temporary / "state.json").write_text(text)
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        if path.exists():  # a run that was told to go back writes the same step again
            shutil.rmtree(path)
        temporary.rename(path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"could not save the checkpoint {path}: {error}. Earlier checkpoints are whole; "
            "free some space or mend the permissions, and run the same command again to go on"
        ) from error
    return path


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder, its sums checked.

    Raises UserError for anything that is not a whole checkpoint of this format.
    """
    state = _read_state(path)
    tensors = []
    for name in TENSOR_FILES:
        try:
            if _sha256(path / name) != state["sha256"][name]:
                raise UserError(f"{path / name} is damaged: its sha256 is not the one in state.json; {REMEDY}")
            tensors.append(safetensors.torch.load_file(path / name))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / name} can not be read: {error}; {REMEDY}") from error
    return Checkpoint(path, tensors[0], tensors[1], state)


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / "state.json").is_file())


def find(path: Path) -> Path:
    """The checkpoint meant by a run folder (its newest one), its `checkpoints` folder, or a checkpoint itself.

    Raises UserError when there is none.
    """
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := all_checkpoints(folder):
            return found[-1]
    raise UserError(f"{path} holds no checkpoint: give a run's folder (out/<run>) or one of its checkpoints")


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints."""
    for path in all_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'state.json'} can not be read: {error}; {REMEDY}") from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is not a checkpoint of format version {FORMAT_VERSION}")
    sums = state.get("sha256")
    if not isinstance(state.get("step"), int) or not isinstance(sums, dict) or set(sums) != set(TENSOR_FILES):
        raise UserError(f"{path / 'state.json'} lacks a step or the sums of {' and '.join(TENSOR_FILES)}")
    return state


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
