"""Checkpoints: save, find, load, prune. Atomic, checksummed, written in the background, without pickle.

A checkpoint is a folder `step_00000500` of three files: `model.safetensors`, `optimizer.safetensors` and `state.json`
(format version, step, whatever the run adds, and the sha256 of all three). It is written under a temporary name,
flushed to disk and renamed, so that a folder with the final name is complete. Loading one runs no code from it.

It holds no random state: everything random in a run is drawn from (seed, step).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanodisp.errors import UserError, to_stderr
from nanodisp.files import digest, flush

FORMAT_VERSION = 2
CHECKPOINTS = "checkpoints"  # their folder in a run's folder
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
REMEDY = "training falls back to the one before; other commands need the name of an older one"


class Damaged(UserError):
    """A checkpoint that was complete once and is not intact now."""


class NoneIntact(UserError):
    """A folder of checkpoints that are all damaged: `found`, newest first, with what is wrong with each."""

    def __init__(self, folder: Path, found: list[tuple[Path, Damaged]]) -> None:
        newest = str(found[0][1]).removesuffix(f"; {REMEDY}")
        super().__init__(
            f"no checkpoint in {folder} is intact ({newest}); restore one from a backup, or delete {folder.parent} to "
            "train from the beginning"
        )
        self.found = found


@dataclass
class Checkpoint:
    """The content of a checkpoint: tensors by name (on the CPU), and the rest of the state."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


def save(folder: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write a checkpoint of `state["step"]` into `folder` and return its path.

    Raises UserError when the disk is full or cannot be written.
    """
    path = path_of(folder, state["step"])
    temporary = folder / f".{path.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        sha256 = {}
        for name, tensors in zip(TENSOR_FILES, (model, optimizer), strict=True):
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_tensors(temporary / name, contiguous)
            sha256[name] = digest(temporary / name)
        state = {"format_version": FORMAT_VERSION, **state}
        sha256["state.json"] = _checksum(state)
        text = json.dumps({**state, "sha256": sha256}, indent=2)
        (temporary / "state.json").write_text(text)
        for file in [*temporary.iterdir(), temporary]:
            flush(file)
        if path.exists():  # a run that fell back to an older checkpoint writes the same step again
            shutil.rmtree(path)
        temporary.rename(path)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"could not save the checkpoint {path}: {error}. Earlier checkpoints are intact; "
            "free some space or fix the permissions, and run the same command again to resume"
        ) from error
    return path


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors with the permissions of any other new file, whereas safetensors makes them 0600."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode)


class Saver:
    """Saves in the background: training waits while tensors are copied, not while files are written.

    One save at a time. The next one, and `wait`, wait for it and raise its error.

    Args:
        folder: of the checkpoints.
        keep_last, keep_every: see `prune`.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._copies: dict[str, Tensor] = {}  # of the last save; the next one reuses their memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Start writing a checkpoint of `state["step"]` with the tensors as they are now."""
        self.wait()
        copies = self._copy("model", model), self._copy("optimizer", optimizer)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._pending = self._thread.submit(self._write, *copies, state)

    def __enter__(self) -> Saver:
        for unfinished in self.folder.glob(".step_*.tmp"):  # of a save that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            try:
                self.wait()
            except UserError as failed:
                to_stderr(f"error: {failed}")

    def wait(self) -> None:
        """Wait until nothing is being written. Raises UserError when the last save failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def last(self) -> str:
        """In words, the checkpoint that a run can resume from."""
        self.wait()
        saved = all_checkpoints(self.folder)
        return f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint has been saved yet"

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
            to_stderr(f"{self.folder}: old checkpoints cannot be deleted: {error}")


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder and verify its checksums.

    Raises UserError for anything but an intact checkpoint of this format, `Damaged` for one that is no longer intact.
    """
    state = read_state(path)
    tensors = []
    for name in TENSOR_FILES:
        try:
            if digest(path / name) != state["sha256"].get(name):
                raise Damaged(f"{path / name} is damaged: its sha256 is not the one in state.json; {REMEDY}")
            tensors.append(safetensors.torch.load_file(path / name))
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path / name} cannot be read: {error}; {REMEDY}") from error
    return Checkpoint(path, tensors[0], tensors[1], state)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint, None for a folder without checkpoints.

    Newer, damaged ones are reported on stderr and renamed to `damaged_step_…`.

    Raises NoneIntact when all are damaged.
    """
    damaged: list[tuple[Path, Damaged]] = []
    for path in reversed(all_checkpoints(folder)):
        try:
            found = load(path)
        except Damaged as error:
            damaged.append((path, error))
            continue
        set_aside(damaged, f"falling back to step {found.step}")
        return found
    if damaged:
        raise NoneIntact(folder, damaged)
    return None


def set_aside(damaged: list[tuple[Path, Damaged]], instead: str) -> None:
    """Rename damaged checkpoints to `damaged_step_…` and report each on stderr; UserError when that fails."""
    for path, error in damaged:
        reason, aside = str(error).removesuffix(f"; {REMEDY}"), path.with_name(f"damaged_{path.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as failed:
            raise UserError(f"{reason}; it cannot be renamed: {failed.strerror}; fix the permissions") from failed
        to_stderr(f"{reason}: renamed to {aside.name}, {instead}")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name[5:])


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint in a run's folder, 0 without one."""
    saved = all_checkpoints(run / CHECKPOINTS)
    return step_of(saved[-1]) if saved else 0


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / "state.json").is_file())


def find(path: Path) -> Path:
    """The checkpoint that a path means.

    A checkpoint is itself; a run's folder, or its `checkpoints` folder, means its newest one; with @best appended the
    one with the lowest validation loss, with @<step> the one of that step.

    Raises UserError if there is none.
    """
    if (path / "state.json").is_file():
        return path
    if path.is_file():
        raise UserError(f"{path} is a file: give the folder that it is in, {path.parent}")
    run, at, which = str(path).rpartition("@")
    if not at or path.exists():
        run, at = str(path), ""
    found = all_checkpoints(Path(run) / CHECKPOINTS) or all_checkpoints(Path(run))
    if not found:
        raise UserError(
            f"{path} holds no checkpoint: give a run's folder (out/<run>), out/<run>@best, out/<run>@<step>, "
            "or the path of one of its checkpoints"
        )
    if not at:
        return found[-1]
    chosen = best(found) if which == "best" else next((p for p in found if p.name[5:] == which.zfill(8)), None)
    if chosen is None:
        steps = ", ".join(str(step_of(p)) for p in found)
        lacking = "none has a validation loss" if which == "best" else f"@{which} is not one of them and not @best"
        raise UserError(f"{run} has checkpoints of steps {steps}, and {lacking}: give {run}@{step_of(found[-1])}")
    return chosen


def best(checkpoints: Sequence[Path]) -> Path | None:
    """The checkpoint with the lowest `val_loss` in its state; None if no intact one has any."""
    losses: dict[Path, float] = {}
    for path in checkpoints:
        with contextlib.suppress(UserError):
            loss = read_state(path).get("val_loss")
            if isinstance(loss, float) and math.isfinite(loss):
                losses[path] = loss
    return min(losses, key=losses.__getitem__, default=None)


def prune(folder: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all checkpoints but the newest `keep_last`, those at multiples of `keep_every`, and the best one.

    See `best`; checkpoints without a validation loss do not compete.
    """
    saved = all_checkpoints(folder)
    chosen = best(saved)
    for path in saved[:-keep_last]:
        if path != chosen and (keep_every is None or step_of(path) % keep_every != 0):
            shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json; raises UserError if it is damaged or of another format."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path / 'state.json'} cannot be read: {error}; {REMEDY}") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}; this version of nanodisp reads format version {FORMAT_VERSION}"
        )
    sha256 = state.get("sha256") if isinstance(state, dict) else None
    rest = {key: value for key, value in state.items() if key != "sha256"} if isinstance(sha256, dict) else {}
    if not isinstance(sha256, dict) or sha256.get("state.json") != _checksum(rest) or type(rest.get("step")) is not int:
        raise Damaged(f"{path / 'state.json'} is damaged: its sha256 is not the one in it; {REMEDY}")
    return state


def _checksum(state: dict[str, Any]) -> str:
    """sha256 of a state's values, independent of their formatting."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
