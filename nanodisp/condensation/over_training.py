"""Compare the layers, steps and runs of which there are snapshots, by linear CKA.

    python -m nanodisp.condensation cka out/<run>
    python -m nanodisp.condensation cka out/<run> out/<other> debiased=true

CKA (`cka.py`) is 1 for states that are the same up to rotation and scale. Two figures: layer by layer at a few steps,
and step by step in a few layers; of two runs, rows are the first and columns the second. Snapshots are written with
train.snapshot_interval=50.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanodisp import cli
from nanodisp.condensation import figures
from nanodisp.condensation.cka import cka_matrix
from nanodisp.errors import UserError
from nanodisp.files import written_into
from nanodisp.runs import snapshots

PANELS = 6  # of a figure, at most


@dataclass
class CkaConfig:
    """How `cka` compares.

    debiased: estimate CKA without bias, which matters if there are fewer tokens than features.
    out: the folder to write to; null is that of the first run.
    """

    debiased: bool = False
    out: str | None = None


def main(argv: Sequence[str]) -> None:
    names, options = cli.split_names(argv)
    config = cli.parse(CkaConfig, options)
    if not 1 <= len(names) <= 2:
        raise UserError("give the folder of one run, or of two: python -m nanodisp.condensation cka out/<run>")
    runs = [snapshots.read(Path(name)) for name in names]
    steps = snapshots.common_steps(runs)
    layers = [run.shape[0] for run in runs]
    states = [[state for step in steps for state in run.hidden(step)] for run in runs]  # [S (L + 1)] of [N, F]
    try:
        table = cka_matrix(*states, debiased=config.debiased).reshape(len(steps), layers[0], len(steps), layers[-1])
    except ValueError as error:
        raise UserError(f"{runs[0].folder}: {error}; use a longer context") from error
    folder = Path(config.out or names[0])
    drawn = write(folder, steps, table, [run.folder.resolve().name for run in runs])
    print(describe(steps, table, of_two=len(runs) == 2), "", sep="\n")
    print("wrote", *drawn)


def write(folder: Path, steps: Sequence[int], table: np.ndarray, names: Sequence[str]) -> list[Path]:
    """Write cka.npz (`cka` float64 [S, L + 1, S, L + 1] and `steps`) and both figures; return their paths."""
    labels = names if len(names) == 2 else ["", ""]
    by_layer = {f"step {steps[s]}": table[s, :, s, :] for s in figures.spread(len(steps), PANELS)}
    depth = min(table.shape[1], table.shape[3])
    by_step = {f"layer {layer}": table[:, layer, :, layer] for layer in figures.spread(depth, PANELS)}
    with written_into(folder):
        np.savez_compressed(folder / "cka.npz", cka=table, steps=np.asarray(steps))
    layers = figures.similarity(by_layer, "layer", labels, list(range(max(table.shape[1], table.shape[3]))))
    over_steps = figures.similarity(by_step, "step", labels, steps)
    return [
        folder / "cka.npz",
        *figures.save(layers, folder / "figures" / "cka_layers"),
        *figures.save(over_steps, folder / "figures" / "cka_steps"),
    ]


def describe(steps: Sequence[int], table: np.ndarray, of_two: bool) -> str:
    """By layer, a row per step: CKA of the two runs; of one run, CKA with its last step."""
    depth = min(table.shape[1], table.shape[3])
    head = "CKA of the two runs, by layer" if of_two else f"CKA with step {steps[-1]}, by layer"
    lines = [head, f"{'step':>8} " + " ".join(f"{layer:6}" for layer in range(depth))]
    for s in figures.spread(len(steps), 2 * PANELS):
        other = s if of_two else len(steps) - 1
        lines.append(f"{steps[s]:8} " + " ".join(f"{table[s, layer, other, layer]:6.3f}" for layer in range(depth)))
    return "\n".join(lines)
