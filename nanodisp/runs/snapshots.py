"""Snapshots: the hidden states of one fixed text while a run trains, kept with the run.

`snapshots/step_00000050.safetensors` in a run's folder holds what every layer makes of the first tokens of the
validation split after so many updates: small enough to keep many, and all that CKA and the explorer need. The text is
the same at every step and in every run on the same data, so that steps, layers and runs can be compared token by token.

Values are float16, in each layer divided by a power of two if they would overflow otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanodisp.errors import UserError, first_line
from nanodisp.files import write_whole

SNAPSHOTS = "snapshots"  # their folder in a run's folder
LARGEST = 2.0**15  # of a stored value: float16 ends at 65,504


def write(folder: Path, step: int, tokens: Tensor, hidden: Tensor) -> Path:
    """Write the snapshot of `step` into `folder`: tokens int64 [T], hidden states [L + 1, T, F] of any float dtype.

    Raises UserError when it cannot be written.
    """
    hidden = hidden.float()
    largest = hidden.nan_to_num(0, 0, 0).abs().amax(dim=(1, 2))  # [L + 1]
    scale = torch.exp2(torch.log2(largest / LARGEST).ceil().clamp(min=0))
    content = {
        "tokens": tokens.to(torch.int32).contiguous(),
        "hidden": (hidden / scale[:, None, None]).to(torch.float16).contiguous(),
        "scale": scale,
    }
    path = path_of(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another out_dir") from error
    write_whole(path, safetensors.torch.save(content))
    return path


def drop_after(folder: Path, step: int) -> None:
    """Delete the snapshots of steps after `step`: a resumed run takes them again."""
    for path in all_snapshots(folder):
        if step_of(path) > step:
            path.unlink()


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def step_of(path: Path) -> int:
    return int(path.stem[5:])


def all_snapshots(folder: Path) -> list[Path]:
    """The snapshots in a folder, oldest first."""
    return sorted((path for path in folder.glob("step_*.safetensors") if path.stem[5:].isdigit()), key=step_of)


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of a run, read one at a time.

    folder: the run's folder.
    steps: in ascending order.
    tokens: int64 [T], the text that all of them are of.
    shape: (L + 1, T, F), of every step's hidden states.
    """

    folder: Path
    steps: tuple[int, ...]
    tokens: np.ndarray
    shape: tuple[int, int, int]

    def hidden(self, step: int) -> np.ndarray:
        """The hidden states at a step, float32 [L + 1, T, F]; raises UserError if the file cannot be read."""
        return _load(path_of(self.folder / SNAPSHOTS, step))[1]


def read(run: Path) -> Snapshots:
    """The snapshots of a run's folder; those that hold NaN or infinity, of a run that diverged, are left out.

    Raises UserError without any, or if they are damaged or not of one text and shape.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder: give the folder of a run, such as out/<run>")
    paths = all_snapshots(run / SNAPSHOTS)
    if not paths:
        raise UserError(f"{run} holds no snapshots: add train.snapshot_interval=50 run_name=<new> to its command")
    steps, first = [], None
    for path in paths:
        tokens, hidden = _load(path)
        first = first or (tokens, hidden.shape)
        if hidden.shape != first[1] or not np.array_equal(tokens, first[0]):
            raise UserError(f"{path} is of another text or model than {paths[0].name}: delete the older ones")
        if np.isfinite(hidden).all():
            steps.append(step_of(path))
    if first is None or not steps:
        raise UserError(f"every snapshot in {run / SNAPSHOTS} has values that are not finite: the run diverged")
    if len(steps) < len(paths):
        print(f"{run}: {len(paths) - len(steps)} of {len(paths)} snapshots are left out: values that are not finite")
    return Snapshots(run, tuple(steps), first[0], first[1])


def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """tokens int64 [T] and hidden states float32 [L + 1, T, F]."""
    try:
        content = safetensors.torch.load_file(path)
        tokens, hidden, scale = content["tokens"], content["hidden"], content["scale"]
        n_layers, n_tokens, _ = hidden.shape
        if tokens.shape != (n_tokens,) or scale.shape != (n_layers,):
            raise ValueError("its tensors do not fit together")
        return tokens.numpy().astype(np.int64), (hidden.float() * scale[:, None, None]).numpy()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): delete it") from error


def common_steps(runs: Sequence[Snapshots]) -> list[int]:
    """The steps that all runs have; raises UserError without any, or if they are not of the same text."""
    for run in runs[1:]:
        if not np.array_equal(run.tokens, runs[0].tokens):
            raise UserError(
                f"{runs[0].folder} and {run.folder} have snapshots of different texts: compare runs on the same data "
                "with the same tokenizer and context"
            )
    steps = sorted(set.intersection(*(set(run.steps) for run in runs)))
    if not steps:
        raise UserError(
            f"{' and '.join(str(run.folder) for run in runs)} have no step in common: give both the same "
            "train.snapshot_interval"
        )
    return steps
