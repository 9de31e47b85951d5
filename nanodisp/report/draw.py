"""The figures of the report: every measure against lambda, losses over steps, cosines by layer.

Their lines carry the labels of the tables' rows or the names of runs as ids, by which the page's filter hides them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile

import numpy as np

from nanodisp.condensation import figures
from nanodisp.report.tables import Row, quantities_of, task_series
from nanodisp.runs.read import RunSummary

MOST_LINES = 16  # in one figure
ALWAYS = ("loss", "masked_loss", "tokens_per_second")  # drawn even if there is only one lambda
FILES = {"tokens_per_second": "cost"}

T = TypeVar("T")
Series = dict[str, dict[float, list[float]]]  # row -> lambda -> the seeds' values


def draw(
    rows: Sequence[Row], runs: Sequence[RunSummary], names: dict[Path, str], folder: Path
) -> list[tuple[str, Path]]:
    """Draw every figure that the runs have data for: captions and SVG files (PNGs beside them)."""
    drawn: list[tuple[str, Path]] = []

    def keep(figure: figures.Figure, name: str, caption: str) -> None:
        drawn.append((caption, figures.save(figure, folder / name)[1]))

    for file, caption, quantity, series in measures(rows):
        keep(figures.against_lambda(series, quantity), file, f"{caption}, against lambda, ± standard error")
    with_losses = [run for run in runs if any(len(steps) for steps, _ in run.losses.values())]
    for key, name, unit in (
        ("loss", "steps", "nats per token"),
        ("masked_loss", "steps_masked", "nats per masked token"),
    ):
        curves = {names[run.folder]: run.losses for run in with_losses if run.loss_name == key}
        loss = key.replace("_", " ")
        for number, part in enumerate(_parts(curves), start=1):
            keep(
                figures.losses(part, f"{loss}, {unit}"),
                f"{name}_{number}",
                f"Training and validation {loss} over steps",
            )
    for number, lines in enumerate(_lines(rows), start=1):
        last = {label: np.stack([run.cosines[-1] for run in seeds]) for label, seeds in lines.items()}
        keep(
            figures.mean_by_layer(last),
            f"layers_{number}",
            "Mean cosine by layer at the end; bands: one standard deviation",
        )
        trajectory = {
            label: (seeds[0].trajectory_steps, np.mean([run.trajectory for run in seeds], axis=0))
            for label, seeds in lines.items()
        }
        keep(figures.over_training(trajectory), f"training_{number}", "Mean cosine by layer over training")
    if measured := dict(list(_histograms(runs))[:MOST_LINES]):
        keep(
            figures.density(measured),
            "density",
            "Density of cosine similarity by layer, of the measured runs",
        )
    return drawn


def measures(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, Series]]:
    """File, caption, quantity and series of every measure: numbers of the runs, means over layers, benchmarks."""
    runs = [run for row in rows for seeds in row.cells.values() for run in seeds.values()]
    for key, quantity in quantities_of(rows).items():
        series = _series(rows, {run.folder: run.numbers.get(key) for run in runs})
        if series and (key in ALWAYS or _has_several_lambdas(series)):
            yield FILES.get(key, key), quantity.name.capitalize(), quantity.name, series
    for name in dict.fromkeys(name for run in runs for name in run.layers):
        series = _series(rows, {run.folder: _over_layers(run, name) for run in runs})
        if _has_several_lambdas(series):
            quantity_name = name.replace("_", " ")
            caption = f"{quantity_name.capitalize()}, mean over the layers after the embedding"
            yield f"over_layers_{name}", caption, quantity_name, series
    for number, (column, series) in enumerate(task_series(rows).items(), start=1):
        yield f"task_{number}", column, column.split(", ")[1], series


def _series(rows: Sequence[Row], numbers: dict[Path, float | None]) -> Series:
    """Numbers of the runs by folder -> by row and lambda, without the runs that have none."""
    found: Series = {}
    for row in rows:
        for disp, seeds in row.cells.items():
            values = [numbers[run.folder] for run in seeds.values()]
            if finite := [value for value in values if value is not None and math.isfinite(value)]:
                found.setdefault(row.label, {})[disp] = finite
    return found


def _over_layers(run: RunSummary, name: str) -> float | None:
    return statistics.fmean(run.layers[name][1:]) if len(run.layers.get(name, ())) > 1 else None


def _has_several_lambdas(series: Series) -> bool:
    return len({disp for line in series.values() for disp in line}) > 1


def _lines(rows: Sequence[Row]) -> list[dict[str, list[RunSummary]]]:
    """Seeds with the same validations, by label: all in one figure if they fit, else figures per row or per lambda."""
    per_row: list[dict[str, list[RunSummary]]] = []
    per_lambda: dict[float, dict[str, list[RunSummary]]] = {}
    known: set[tuple[Path, ...]] = set()  # a baseline that rows share is drawn once
    for row in rows:
        lines = {}
        for disp, seeds in row.cells.items():
            first = next(iter(seeds.values()))
            alike = [run for run in seeds.values() if np.array_equal(run.steps, first.steps)]
            alike = [run for run in alike if run.cosines.shape == first.cosines.shape]
            alike = [run for run in alike if np.array_equal(run.trajectory_steps, first.trajectory_steps)]
            name = f"lambda {disp:g}" if len(rows) == 1 else f"{row.label}, lambda {disp:g}"
            if (who := tuple(run.folder for run in alike)) not in known and first.cosines.size:
                known.add(who)
                lines[name] = per_lambda.setdefault(disp, {})[name] = alike
        per_row.append(lines)
    together = {label: seeds for lines in per_row for label, seeds in lines.items()}
    if len(together) <= MOST_LINES:
        return [together] if together else []
    by_lambda = [per_lambda[disp] for disp in sorted(per_lambda)]
    return min(([part for lines in of for part in _parts(lines)] for of in (per_row, by_lambda)), key=len)


def _parts(lines: dict[str, T]) -> Iterator[dict[str, T]]:
    """The lines of one figure after another."""
    items = list(lines.items())
    for first in range(0, len(items), MOST_LINES):
        yield dict(items[first : first + MOST_LINES])


def _histograms(runs: Sequence[RunSummary]) -> Iterator[tuple[str, np.ndarray]]:
    """Name with step, and histogram, of each run that `python -m nanodisp.condensation` has measured."""
    for run in runs:
        try:
            with np.load(run.folder / "condensation.npz", allow_pickle=False) as arrays:
                yield json.loads((run.folder / "condensation.json").read_text())["source"], arrays["histogram"]
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            continue
