"""The tables of the report: finished runs grouped by configuration, and each cell as text.

Runs that differ only in their seed share a cell. Rows are model sizes (and whatever else the sweep varied), columns are
lambda; for benchmarks the rows are both of these, the columns are tasks. At lambda 0 the other settings of dispersion
have no effect, so these runs are the baseline of all rows that share the remaining settings. The loss of decoders
and the masked loss of encoders are two quantities with a table each. Every number that is shown goes through
`Quantity.show`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanodisp.condensation.figures import standard_error
from nanodisp.models.blocks import GPT2
from nanodisp.runs.evaluation import main_metric
from nanodisp.runs.read import LAMBDA, RunSummary, as_text, differences

OF_SIZE = ("model.n_layer", "model.n_embd")  # part of a row's size
# Left out of a row's label where runs of one size and one name of the architecture do not differ in them.
SWITCHES = tuple(f"model.{key}" for key in GPT2)
OFTEN_OF_SIZE = ("model.n_head", "model.block_size", *SWITCHES)
NOTHING = "\N{EN DASH}"  # in place of a missing number


@dataclass(frozen=True)
class Quantity:
    """A number of a run in the report: its name, its format, and which value is best (None: unknown)."""

    name: str
    form: str
    best: Callable[[list[float]], float] | None = min

    def show(self, value: float | None, signed: bool = False) -> str:
        if value is None or not math.isfinite(value):
            return NOTHING
        return format(value, ("+" if signed else "") + self.form).replace("-", "\N{MINUS SIGN}")


QUANTITIES = {
    "loss": Quantity("validation loss, nats per token", ".4f"),
    "masked_loss": Quantity("masked validation loss, nats per masked token", ".4f"),
    "bpb": Quantity("bits per byte", ".4f"),
    "mean_cosine": Quantity("mean cosine, last layer", ".4f"),
    "rho": Quantity("rho, mean cosine against depth", ".3f"),
    "tau": Quantity("tau, mean cosine against depth", ".3f"),
    "tokens_per_second": Quantity("tokens per second", ",.0f", max),
}
SCORE = Quantity("benchmarks", ".4f")
LAYER_FIGURE = Quantity("figures by layer", ".4f")


@dataclass
class Row:
    """Runs of one kind: lambda -> seed -> the finished run."""

    label: str
    cells: dict[float, dict[int, RunSummary]]

    @property
    def n_layer(self) -> int:
        """Layers of the model, the same for all runs of a row."""
        return next(run for seeds in self.cells.values() for run in seeds.values()).config["model.n_layer"]

    def values(self, disp: float, quantity: str) -> dict[int, float]:
        """Seed -> value, of the seeds that have one."""
        numbers = {seed: run.numbers.get(quantity) for seed, run in self.cells.get(disp, {}).items()}
        return {seed: value for seed, value in numbers.items() if value is not None and math.isfinite(value)}


@dataclass
class Cell:
    """The content of a cell: mean ± standard error, the difference to lambda 0, whether it is the row's best."""

    text: str
    difference: str = ""
    best: bool = False


def make_rows(runs: Sequence[RunSummary]) -> list[Row]:
    """Group finished runs; of two with the same configuration and seed, the one with the later name is used."""
    finished = [run for run in runs if run.status == "finished"]
    differing = {key: by_run for key, by_run in differences(finished).items() if key not in (LAMBDA, "seed", *OF_SIZE)}
    several = any(key in SWITCHES for key in differing)  # architectures
    varied = [
        key
        for key, by_run in differing.items()
        if not _follows_from_size(key, by_run, finished) and not _follows_from_a_teacher(key, by_run)
    ]
    kinds: dict[Any, dict[float, dict[int, RunSummary]]] = defaultdict(lambda: defaultdict(dict))
    baselines: dict[Any, dict[int, RunSummary]] = defaultdict(dict)

    def parts(run: RunSummary, of_dispersion: bool) -> str:
        keys = [key for key in varied if key.startswith("dispersion.") == of_dispersion]
        values = {key: differing[key][run.folder] for key in keys}
        return ", ".join(
            f"{key.split('.')[-1]}={as_text(value)}"
            for key, value in values.items()
            if value is not None or not key.startswith("intervention.")  # null: the run has no such intervention
        )

    for run in finished:
        kind_of_model = run.architecture if several else ""
        base = (run.n_parameters, f"{run.size}, {kind_of_model}".strip(", "), parts(run, of_dispersion=False))
        disp, seed = float(run.config[LAMBDA]), int(run.config["seed"])
        if disp == 0:
            baselines[base][seed] = run
        else:
            kind = (*base, parts(run, of_dispersion=True))
            kinds[kind][disp][seed] = run
    for base, seeds in baselines.items():
        for kind in [kind for kind in kinds if kind[:3] == base] or [(*base, "")]:
            kinds[kind][0.0] = seeds
    return [
        Row(", ".join(filter(None, kind[1:])), dict(sorted(cells.items())))
        for kind, cells in sorted(kinds.items(), key=lambda item: item[0])
    ]


def _follows_from_size(key: str, by_run: dict[Path, Any], runs: Sequence[RunSummary]) -> bool:
    """Whether all runs of one size and architecture, as the labels name them, share this key of the model."""
    values = defaultdict(set)
    for run in runs:
        values[run.size, run.architecture].add(by_run[run.folder])
    return key in OFTEN_OF_SIZE and all(len(of_size) == 1 for of_size in values.values())


def _follows_from_a_teacher(key: str, by_run: dict[Path, Any]) -> bool:
    """Whether all runs with a teacher share this setting of distillation: then naming the teacher is enough."""
    return key.startswith("intervention.distillation_") and len(set(by_run.values()) - {None}) == 1


def quantities_of(rows: Sequence[Row]) -> dict[str, Quantity]:
    """`QUANTITIES`, and every other figure that the runs recorded, under its own name."""
    runs = [run for row in rows for seeds in row.cells.values() for run in seeds.values()]
    added = dict.fromkeys(name for run in runs for name in run.numbers if name not in QUANTITIES)
    return QUANTITIES | {name: Quantity(name.replace("_", " "), ".4f", None) for name in added}


def make_table(rows: Sequence[Row], key: str, quantity: Quantity, lambdas: Sequence[float]) -> list[list[Cell]]:
    """A row of cells per row of runs, a cell per lambda, of the runs' number `key`."""
    table = []
    for row in rows:
        values = {disp: row.values(disp, key) for disp in lambdas}
        means = {disp: statistics.fmean(seeds.values()) for disp, seeds in values.items() if seeds}
        best = quantity.best(list(means.values())) if quantity.best and len(means) > 1 else None
        cells = []
        for disp in lambdas:
            if disp not in means:
                cells.append(Cell(NOTHING))
                continue
            error = standard_error(list(values[disp].values()))
            text = quantity.show(means[disp]) + (f" ± {quantity.show(error)}" if math.isfinite(error) else "")
            cells.append(
                Cell(text, _difference(quantity, values[disp], values.get(0.0, {}), disp), means[disp] == best)
            )
        table.append(cells)
    return table


def make_layer_tables(rows: Sequence[Row]) -> dict[str, dict[str, list[Cell]]]:
    """Figure name -> row and lambda -> one cell per layer, of the last validation, averaged over seeds."""
    tables: dict[str, dict[str, list[Cell]]] = {}
    for row in rows:
        for disp, seeds in row.cells.items():
            for name in dict.fromkeys(name for run in seeds.values() for name in run.layers):
                last = [run.layers[name] for run in seeds.values() if name in run.layers]
                last = [values for values in last if len(values) == row.n_layer + 1]
                if last:
                    cells = [Cell(LAYER_FIGURE.show(mean)) for mean in np.mean(last, axis=0)]
                    tables.setdefault(name, {})[f"{row.label}, lambda {disp:g}"] = cells
    for table in tables.values():
        deepest = max(map(len, table.values()))
        table |= {label: cells + [Cell(NOTHING)] * (deepest - len(cells)) for label, cells in table.items()}
    return tables


def paired_interval(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float]:
    """Mean of value - baseline over the shared seeds, and half the width of its 95% t interval.

    NaN for a mean without shared seeds, and for a width with fewer than two.
    """
    from scipy import stats

    gaps = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not gaps:
        return math.nan, math.nan
    return statistics.fmean(gaps), float(stats.t.ppf(0.975, len(gaps) - 1)) * standard_error(gaps)


def _difference(quantity: Quantity, values: dict[int, float], baseline: dict[int, float], disp: float) -> str:
    gap, half = paired_interval(values, baseline)
    if disp == 0 or not math.isfinite(gap):
        return ""
    interval = f" [{quantity.show(gap - half, True)}, {quantity.show(gap + half, True)}]" if math.isfinite(half) else ""
    return f"Δ {quantity.show(gap, True)}{interval}"


# --- benchmarks -------------------------------------------------------------------------

Score = tuple[float, float]  # value, standard error over examples (NaN if unknown)


@dataclass
class Group:
    """Evaluated runs of one row and lambda: column -> seed -> score.

    baseline: the label of the row's runs at lambda 0, "" for themselves and for imported models.
    """

    label: str
    baseline: str
    scores: dict[str, dict[int, Score]]


def group_mean(seeds: dict[int, Score]) -> float:
    return statistics.fmean(value for value, _ in seeds.values())


def make_task_table(
    rows: Sequence[Row], imported: Sequence[RunSummary] = ()
) -> tuple[list[str], dict[str, list[Cell]]]:
    """Column heads, and row label -> cells, of the runs that have been evaluated.

    Each of `imported`, models that were not trained here, is a row of its own, before the others.

    A column is a task with its settings: another metric, other shots or another number of examples is another column.
    Mean and mean rank are over the tasks that all rows have: the mean over those where higher is better, the rank (1 is
    best, ties share their mean rank) over all. Standard errors are over seeds, or over examples for a single run.
    Differences are to the row's lambda 0, paired by seed, with a 95% t interval.
    """
    kinds = {f"{run.folder.name}, imported": {0: run} for run in imported}
    groups = [Group(label, "", {}) for label in kinds]
    for row in rows:
        for disp, runs in row.cells.items():
            baseline, label = (f"{row.label}, lambda {each:g}" for each in (0.0, disp))
            kinds[label] = runs
            groups.append(Group(label, baseline if disp else "", {}))
    rising: dict[str, bool] = {}  # column -> whether higher is better
    for group in groups:
        for seed, run in kinds[group.label].items():
            for column, score, higher_is_better in _scores(run):
                group.scores.setdefault(column, {})[seed] = score
                rising[column] = higher_is_better
    groups = [group for group in groups if group.scores]
    shared = [column for column in rising if all(column in group.scores for group in groups)]
    averaged = [column for column in shared if rising[column]]
    cells: dict[str, list[Cell]] = {group.label: [] for group in groups}

    def add(scores: dict[str, dict[int, Score]], best: float | None = None) -> None:
        """A cell for each group, of its seeds' scores; those whose mean is `best` are marked."""
        for group in groups:
            cell = _cell(scores[group.label], bool(scores[group.label]) and group_mean(scores[group.label]) == best)
            values, baseline = (
                {seed: value for seed, (value, _) in scores.get(label, {}).items()}
                for label in (group.label, group.baseline)
            )
            cell.difference = _difference(SCORE, values, baseline, disp=1.0)
            cells[group.label].append(cell)

    for column, higher_is_better in rising.items():
        scores = {group.label: group.scores.get(column, {}) for group in groups}
        means = [group_mean(seeds) for seeds in scores.values() if seeds]
        add(scores, (max if higher_is_better else min)(means) if len(means) > 1 else None)
    add({group.label: _mean_scores(group, averaged) for group in groups})
    for group in groups:
        ranks = [_rank(group, groups, column, rising[column]) for column in shared]
        cells[group.label].append(Cell(f"{statistics.fmean(ranks):.2f}" if ranks else NOTHING))
    return [*rising, f"mean of {len(averaged)}", f"mean rank of {len(shared)}"], cells


def task_series(rows: Sequence[Row]) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Column of the task table -> row -> lambda -> the seeds' scores, of the rows with scores at several lambdas."""
    series: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in rows:
        for disp, runs in row.cells.items():
            for run in runs.values():
                for column, (value, _), _ in _scores(run):
                    series.setdefault(column, {}).setdefault(row.label, {}).setdefault(disp, []).append(value)
    kept = {column: {row: line for row, line in lines.items() if len(line) > 1} for column, lines in series.items()}
    return {column: lines for column, lines in kept.items() if lines}


def _scores(run: RunSummary) -> Iterator[tuple[str, Score, bool]]:
    """Column, score and whether higher is better, of each task that the run has a value for."""
    for name, entry in run.tasks.items():
        metric = main_metric(entry)
        value, stderr = (entry["metrics"][metric][key] for key in ("value", "stderr"))
        shots = "mixed shots" if entry["shots"] is None else f"{entry['shots']}-shot"
        if value is not None:
            column = f"{name}, {metric}, {shots}, {entry['examples']:,} examples"
            score = (value, math.nan if stderr is None else stderr)
            yield column, score, bool(entry["metrics"][metric]["higher_is_better"])


def _mean_scores(group: Group, columns: Sequence[str]) -> dict[int, Score]:
    """Seed -> mean over the columns, of the seeds that have all of them."""
    of_seed: dict[int, list[Score]] = defaultdict(list)
    for column in columns:
        for seed, score in group.scores[column].items():
            of_seed[seed].append(score)
    return {
        seed: (
            statistics.fmean(value for value, _ in scores),
            math.hypot(*(error for _, error in scores)) / len(scores),
        )
        for seed, scores in of_seed.items()
        if len(scores) == len(columns)
    }


def _cell(seeds: dict[int, Score], best: bool = False) -> Cell:
    if not seeds:
        return Cell(NOTHING)
    values, errors = zip(*seeds.values(), strict=True)
    error = standard_error(list(values)) if len(values) > 1 else errors[0]
    text = SCORE.show(statistics.fmean(values)) + (f" ± {SCORE.show(error)}" if math.isfinite(error) else "")
    return Cell(text, best=best)


def _rank(group: Group, groups: Sequence[Group], task: str, rising: bool) -> float:
    """1 to len(groups); ties share their mean rank."""
    own, *others = (group_mean(each.scores[task]) for each in (group, *(g for g in groups if g is not group)))
    before = sum(value > own if rising else value < own for value in others)
    return 1 + before + sum(value == own for value in others) / 2
