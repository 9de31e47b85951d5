"""A folder of runs summarised on one page.

    python -m nanodisp.report out/<sweep>

writes into out/<sweep>/report: index.html (self-contained, with a filter by every key that differs), report.md,
runs.csv and figures/. Runs are read by `runs/read.py`, tables made by `tables.py`, figures by `draw.py`, pages by
`page.py`.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
import csv
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp import cli
from nanodisp.condensation.layers import LAYER_FIGURES
from nanodisp.errors import UserError
from nanodisp.report.draw import draw
from nanodisp.report.page import Report, render
from nanodisp.report.tables import (
    Row,
    make_layer_tables,
    make_rows,
    make_table,
    make_task_table,
    quantities_of,
)
from nanodisp.runs.read import RunSummary, as_text, differences, read_runs


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
    names = names_of(runs, varied)
    return Report(
        title=str(folder),
        facts=list(facts_of(folder, runs)),
        tables=tables,
        figures=draw(rows, runs, names, target / "figures"),
        runs=[line_of(run, quantities, by_layer, varied) for run in runs],
        kinds={label: values_of(of, varied) for label, of in labelled(rows, runs, names).items()},
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


def labelled(rows: Sequence[Row], runs: Sequence[RunSummary], names: dict[Path, str]) -> dict[str, list[RunSummary]]:
    """Every label of a table's row, a figure's line or a run's entry -> its runs."""
    found: dict[str, list[RunSummary]] = {}
    for run in runs:
        found |= {run.folder.name: [run], names[run.folder]: [run]}
    for row in rows:
        for disp, seeds in row.cells.items():
            found.setdefault(row.label, []).extend(seeds.values())
            found[f"{row.label}, lambda {disp:g}"] = list(seeds.values())
            if len(rows) == 1:
                found[f"lambda {disp:g}"] = list(seeds.values())
    return found


def values_of(runs: Iterable[RunSummary], varied: dict[str, dict[Path, object]]) -> dict[str, list[str]]:
    """Key -> the values that these runs have, of the keys that differ between runs."""
    return {
        key: list(dict.fromkeys(as_text(by_run[run.folder]) for run in runs if run.folder in by_run))
        for key, by_run in varied.items()
    }


def plain(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else str(value)


if __name__ == "__main__":
    cli.run(main)
