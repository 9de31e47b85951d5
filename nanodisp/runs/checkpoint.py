"""Checkpoints: save, find, load, prune. Atomic, checked, written in the background, and free of pickle.

A checkpoint is a folder `step_00000500` of three files: `model.safetensors`,
`optimizer.safetensors` and `state.json` (format version, step, whatever the run adds, and
the sha256 of all three). It is written under a temporary name, flushed to disk and
renamed, so that a folder of the right name is whole. Loading one runs no code of its author.

There is no random state in it: everything random in a run is drawn from (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanodisp.errors import UserError
from nanodisp.files import digest, flush

FORMAT_VERSION = 2
CHECKPOINTS = "checkpoints"  # the folder of them, in a run's
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
REMEDY = "training goes back to the one before; elsewhere name an older one"


class Damaged(UserError):
    """A checkpoint that was whole once, and is not now."""


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
    path = path_of(folder, state["step"])
    temporary = folder / f".{path.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        sha256 = {}
        for name, tensors in zip(TENSOR_FILES, (model, optimizer), strict=True):
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, temporary / name)
            sha256[name] = digest(temporary / name)
        state = {"format_version": FORMAT_VERSION, **state}
        sha256["state.json"] = _sum_of(state)
        text = json.dumps({**state, "sha256": sha256}, indent=2)
        (temporary / "state.json").write_text(text)
        for file in [*temporary.iterdir(), temporary]:
            flush(file)
        if path.exists():  # a run that was told to go back writes the same step again
            shutil.rmtree(path)
        temporary.rename(path)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"could not save the checkpoint {path}: {error}. Earlier checkpoints are whole; "
            "free some space or mend the permissions, and run the same command again to go on"
        ) from error
    return path


class Saver:
    """Saves in the background: training waits while tensors are copied, not while files are written.

    One save at a time. The next one, and `wait`, wait for it and raise what went wrong with it.

    Args:
        folder: where the checkpoints lie.
        keep_last, keep_every: see `prune`.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._copies: dict[str, Tensor] = {}  # of the last save, whose memory the next one uses again
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint of `state["step"]`, of the tensors as they are now."""
        self.wait()
        copies = self._copy("model", model), self._copy("optimizer", optimizer)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._pending = self._thread.submit(self._write, *copies, state)

    def __enter__(self) -> Saver:
        for rest in self.folder.glob(".step_*.tmp"):  # of a save that was killed
            shutil.rmtree(rest, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            try:
                self.wait()
            except UserError as failed:
                print(f"error: {failed}", file=sys.stderr)

    def wait(self) -> None:
        """Until nothing is being written. Raises UserError when the last save failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def last(self) -> str:
        """In words, which checkpoint a run can go on from."""
        self.wait()
        whole = all_checkpoints(self.folder)
        return f"the last checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"

    def _copy(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            copy = self._copies.get(f"{kind}/{name}")
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[f"{kind}/{name}"] = copy
            copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        save(self.folder, model, optimizer, state)
        try:
            prune(self.folder, self.keep_last, self.keep_every)
        except OSError as error:
            print(f"{self.folder}: old checkpoints can not be deleted: {error}", file=sys.stderr)


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder, its sums checked.

    Raises UserError for anything that is not a whole checkpoint of this format, `Damaged` where it was one.
    """
    state = _read_state(path)
    tensors = []
    for name in TENSOR_FILES:
        try:
            if digest(path / name) != state["sha256"].get(name):
                raise Damaged(f"{path / name} is damaged: its sha256 is not the one in state.json; {REMEDY}")
            tensors.append(safetensors.torch.load_file(path / name))
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path / name} can not be read: {error}; {REMEDY}") from error
    return Checkpoint(path, tensors[0], tensors[1], state)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None when there is none at all.

    Damaged ones that are newer are named on stderr and set aside as `damaged_step_…`.

    Raises UserError when none is whole.
    """
    damaged: list[tuple[Path, Damaged]] = []
    for path in reversed(all_checkpoints(folder)):
        try:
            found = load(path)
        except Damaged as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            aside = bad.with_name(f"damaged_{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
            print(f"{reason}: set aside as {aside.name}, going back to step {found.step}", file=sys.stderr)
        return found
    if damaged:
        raise UserError(f"no checkpoint in {folder} is whole; the newest: {damaged[0][1]}")
    return None


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / "state.json").is_file())


def find(path: Path) -> Path:
    """The checkpoint meant by a run folder (its newest one), its `checkpoints` folder, or a checkpoint itself.

    Raises UserError when there is none.
    """
    if (path / "state.json").is_file():
        return path
    for folder in (path / CHECKPOINTS, path):
        if found := all_checkpoints(folder):
            return found[-1]
    raise UserError(f"{path} holds no checkpoint: give a run's folder (out/<run>) or one of its checkpoints")


def prune(folder: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all checkpoints but the newest `keep_last`, those of every `keep_every` steps, and the best one.

    The best is the one with the lowest "val_loss" in its state, of those that have one.
    """
    losses: dict[Path, float] = {}
    for path in all_checkpoints(folder):
        try:
            loss = _read_state(path).get("val_loss")
        except UserError:
            continue
        if isinstance(loss, float) and math.isfinite(loss):
            losses[path] = loss
    best = min(losses, key=losses.__getitem__, default=None)
    for path in all_checkpoints(folder)[:-keep_last]:
        if path != best and (keep_every is None or int(path.name[5:]) % keep_every != 0):
            shutil.rmtree(path)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path / 'state.json'} can not be read: {error}; {REMEDY}") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {version}; this is of format version {FORMAT_VERSION}"
        )
    sums = state.get("sha256") if isinstance(state, dict) else None
    rest = {key: value for key, value in state.items() if key != "sha256"} if isinstance(sums, dict) else {}
    if not isinstance(sums, dict) or sums.get("state.json") != _sum_of(rest) or not isinstance(rest.get("step"), int):
        raise Damaged(f"{path / 'state.json'} is damaged: its sha256 is not the one in it; {REMEDY}")
    return state


def _sum_of(state: dict[str, Any]) -> str:
    """sha256 of a state, by its values and not by how they are written."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
