"""A folder of runs summarised on one page.

    python -m nanodisp.report out/<sweep>

writes into out/<sweep>/report: index.html (self-contained), report.md, runs.csv and figures/. Runs are read by
`runs/read.py`, tables made by `tables.py`, pages by `page.py`.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
import csv
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp import cli
from nanodisp.condensation import figures
from nanodisp.condensation.layers import LAYER_FIGURES
from nanodisp.errors import UserError
from nanodisp.report.page import Report, render
from nanodisp.report.tables import (
    QUANTITIES,
    Row,
    make_layer_tables,
    make_rows,
    make_table,
    make_task_table,
    quantities_of,
    task_series,
)
from nanodisp.runs.read import RunSummary, as_text, differences, read_runs

MOST_LINES = 16  # in one figure


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1 or not argv[0]:
        raise UserError("give one folder of runs: python -m nanodisp.report out/<sweep>")
    folder = Path(argv[0])
    target = folder / "report"
    report = gather(folder, target)
    try:
        target.mkdir(exist_ok=True)
        (target / "index.html").write_text(render(report, "page.html", target), encoding="utf-8")
        (target / "report.md").write_text(render(report, "page.md", target), encoding="utf-8")
        with (target / "runs.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(report.runs[0]))
            table.writeheader()
            table.writerows(report.runs)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    print(*report.facts, f"wrote {target}/index.html, report.md and runs.csv", sep="\n")


def gather(folder: Path, target: Path) -> Report:
    """Read the runs of `folder`, draw into `target`/figures."""
    runs = read_runs(folder)
    rows = make_rows(runs)
    lambdas = sorted({disp for row in rows for disp in row.cells})
    head = ["lambda", *(f"{disp:g}" for disp in lambdas)]
    quantities = quantities_of(rows)
    tables = {}
    for key, quantity in quantities.items():
        if having := [row for row in rows if any(row.values(disp, key) for disp in lambdas)]:
            cells = make_table(having, key, quantity, lambdas)
            tables[quantity.name] = (head, dict(zip([row.label for row in having], cells, strict=True)))
    for name, layers in make_layer_tables(rows).items():
        tables[f"{name.replace('_', ' ')} by layer"] = (
            ["layer", *map(str, range(len(next(iter(layers.values())))))],
            layers,
        )
    heads, benchmarks = make_task_table(rows, [run for run in runs if run.is_imported])
    if benchmarks:
        tables["benchmarks"] = (["task", *heads], benchmarks)
    by_layer = dict.fromkeys([*LAYER_FIGURES, *(name for run in runs for name in run.layers)])
    varied = differences(runs)
    return Report(
        title=str(folder),
        facts=list(facts_of(folder, runs)),
        tables=tables,
        figures=draw(rows, runs, names_of(runs, varied), target / "figures"),
        runs=[line_of(run, quantities, by_layer, varied) for run in runs],
    )


def facts_of(folder: Path, runs: Sequence[RunSummary]) -> Iterator[str]:
    """The number of runs and how they ended; the command of the sweep."""
    counts = Counter(run.status for run in runs)
    yield f"{len(runs)} run{'s' * (len(runs) > 1)}: " + ", ".join(
        f"{n} {status}" for status, n in sorted(counts.items())
    )
    try:
        task = OmegaConf.load(folder / "multirun.yaml").hydra.overrides.task
        yield "the sweep: " + shlex.join(["python", "train.py", "-m", *task])
    except (OSError, YAMLError, OmegaConfBaseException, AttributeError, TypeError):
        pass  # the runs are not one sweep of Hydra's


def line_of(
    run: RunSummary, quantities: Iterable[str], by_layer: Iterable[str], varied: dict[str, dict[Path, object]]
) -> dict[str, str]:
    """A run's line of runs.csv: numbers in full precision, empty if missing."""
    return {
        "run": run.folder.name,
        "status": run.status,
        "problem": run.problem,
        "step": str(run.step),
        "total_steps": str(run.total_steps),
        "parameters": str(run.n_parameters),
        **{key: plain(run.numbers.get(key)) for key in quantities},
        **{f"{name}_by_layer": " ".join(map(plain, run.layers.get(name, []))) for name in by_layer},
        "differs": differing(run, varied),
        "command": str(run.config.get("command") or ""),
    }


def differing(run: RunSummary, varied: dict[str, dict[Path, object]], short: bool = False) -> str:
    """What tells a run from the others, as key=value; `short` without the sections of the keys."""
    values = {key: by_run[run.folder] for key, by_run in varied.items() if run.folder in by_run}
    return " ".join(f"{key.split('.')[-1] if short else key}={as_text(value)}" for key, value in values.items())


def names_of(runs: Sequence[RunSummary], varied: dict[str, dict[Path, object]]) -> dict[Path, str]:
    """A short name per run: what tells it from the others, or its folder's name if that is empty or not enough."""
    short = {run.folder: differing(run, varied, short=True) for run in runs}
    counts = Counter(short.values())
    return {folder: name if name and counts[name] == 1 else folder.name for folder, name in short.items()}


def plain(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else str(value)


# --- figures ----------------------------------------------------------------------------


def draw(
    rows: Sequence[Row], runs: Sequence[RunSummary], names: dict[Path, str], folder: Path
) -> list[tuple[str, Path]]:
    """Draw every figure that the runs have data for: captions and SVG files (PNGs beside them)."""
    drawn: list[tuple[str, Path]] = []

    def keep(figure: figures.Figure, name: str, caption: str) -> None:
        drawn.append((caption, figures.save(figure, folder / name)[1]))

    for key, name in (("loss", "loss"), ("masked_loss", "masked_loss"), ("tokens_per_second", "cost")):
        series = {row.label: {disp: [*row.values(disp, key).values()] for disp in row.cells} for row in rows}
        series = {label: {disp: values for disp, values in line.items() if values} for label, line in series.items()}
        if series := {label: line for label, line in series.items() if line}:
            quantity = QUANTITIES[key].name
            keep(
                figures.against_lambda(series, quantity),
                name,
                f"{quantity.capitalize()} against lambda, ± standard error",
            )
    for number, (column, series) in enumerate(task_series(rows).items(), start=1):
        keep(
            figures.against_lambda(series, column.split(", ")[1]),
            f"task_{number}",
            f"{column}, against lambda, ± standard error",
        )
    with_losses = [run for run in runs if any(len(steps) for steps, _ in run.losses.values())]
    for key, name, unit in (
        ("loss", "steps", "nats per token"),
        ("masked_loss", "steps_masked", "nats per masked token"),
    ):
        curves = {names[run.folder]: run.losses for run in with_losses if run.loss_name == key}
        loss = key.replace("_", " ")
        for first in range(0, len(curves), MOST_LINES):
            drawn_now = dict(list(curves.items())[first : first + MOST_LINES])
            figure = figures.losses(drawn_now, f"{loss}, {unit}")
            keep(figure, f"{name}_{1 + first // MOST_LINES}", f"Training and validation {loss} over steps")
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
        keep(figures.over_training(trajectory), f"training_{number}", "Mean cosine of every layer over training")
    if measured := dict(list(_histograms(runs))[:MOST_LINES]):
        keep(
            figures.density(measured),
            "density",
            "Density of cosine similarity by layer, of the measured runs",
        )
    return drawn


def _lines(rows: Sequence[Row]) -> list[dict[str, list[RunSummary]]]:
    """Seeds with the same validations, by label: all in one figure if they fit, else a figure per row or per lambda."""
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
    by_lambda = [per_lambda[disp] for disp in sorted(per_lambda)]
    figures = min(
        per_row, by_lambda, key=lambda figures: (max(map(len, figures), default=0) > MOST_LINES, len(figures))
    )
    return [lines for lines in ([together] if len(together) <= MOST_LINES else figures) if lines]


def _histograms(runs: Sequence[RunSummary]) -> Iterator[tuple[str, np.ndarray]]:
    """Name with step, and histogram, of each run that `python -m nanodisp.condensation` has measured."""
    for run in runs:
        try:
            with np.load(run.folder / "condensation.npz", allow_pickle=False) as arrays:
                yield json.loads((run.folder / "condensation.json").read_text())["source"], arrays["histogram"]
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            continue


if __name__ == "__main__":
    cli.run(main)
