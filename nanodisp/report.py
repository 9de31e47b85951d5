"""A folder of runs becomes an answer on one page.

    python -m nanodisp.report out/<sweep>

writes into out/<sweep>/report: index.html (self-contained), report.md, runs.csv and figures/.

What the runs are is read by `runs.py`, and what the tables say of them is made in `tables.py`.
"""

from __future__ import annotations

import base64
import csv
import html
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from zipfile import BadZipFile

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp import arguments, figures
from nanodisp.errors import UserError
from nanodisp.runs import Run, command_of, default_config, differences, hydra_value, read_runs
from nanodisp.tables import QUANTITIES, Cell, Row, make_layer_table, make_rows, make_table, make_task_table

MOST_LINES = 12  # of one figure


# --- figures ----------------------------------------------------------------------------


def draw(rows: Sequence[Row], runs: Sequence[Run], folder: Path) -> list[tuple[str, Path]]:
    """Draw what the runs have data for: captions, and the SVG files (PNGs beside them)."""
    drawn: list[tuple[str, Path]] = []

    def keep(figure: figures.Figure, name: str, caption: str) -> None:
        drawn.append((caption, figures.save(figure, folder / name)[1]))

    for key, name in (("loss", "loss"), ("tokens_per_second", "cost")):
        series = {row.label: {disp: [*row.values(disp, key).values()] for disp in row.cells} for row in rows}
        series = {label: {disp: there for disp, there in line.items() if there} for label, line in series.items()}
        if any(series.values()):
            quantity = QUANTITIES[key].name
            keep(
                figures.against_lambda(series, quantity),
                name,
                f"{quantity.capitalize()} against lambda, ± standard error",
            )
    for number, lines in enumerate(_lines(rows), start=1):
        last = {label: np.stack([run.cosines[-1] for run in seeds]) for label, seeds in lines.items()}
        keep(
            figures.mean_by_layer(last),
            f"layers_{number}",
            "Mean cosine by layer at the end; bands: one standard deviation",
        )
        course = {
            label: (seeds[0].course_steps, np.mean([run.course for run in seeds], axis=0))
            for label, seeds in lines.items()
        }
        keep(figures.over_training(course), f"training_{number}", "Mean cosine of every layer over training")
    if measured := dict(list(_histograms(runs))[:MOST_LINES]):
        keep(figures.density(measured), "density", "Density of cosine similarity by layer, where it was measured")
    return drawn


def _lines(rows: Sequence[Row]) -> list[dict[str, list[Run]]]:
    """Seeds that have the same validations, by label: all in one figure if they fit, else a figure per row."""
    per_row: list[dict[str, list[Run]]] = []
    known: set[tuple[Path, ...]] = set()  # a baseline that rows share is drawn once
    for row in rows:
        lines = {}
        for disp, seeds in row.cells.items():
            first = next(iter(seeds.values()))
            alike = [run for run in seeds.values() if np.array_equal(run.steps, first.steps)]
            alike = [run for run in alike if run.cosines.shape == first.cosines.shape]
            alike = [run for run in alike if np.array_equal(run.course_steps, first.course_steps)]
            name = f"lambda {disp:g}" if len(rows) == 1 else f"{row.label}, lambda {disp:g}"
            if (who := tuple(run.folder for run in alike)) not in known and first.cosines.size:
                known.add(who)
                lines[name] = alike
        per_row.append(lines)
    together = {label: seeds for lines in per_row for label, seeds in lines.items()}
    return [lines for lines in ([together] if len(together) <= MOST_LINES else per_row) if lines]


def _histograms(runs: Sequence[Run]) -> Iterator[tuple[str, np.ndarray]]:
    """Of the runs that `python -m nanodisp.condensation` has looked at."""
    for run in runs:
        try:
            with np.load(run.folder / "condensation.npz", allow_pickle=False) as arrays:
                yield run.folder.name, arrays["histogram"]
        except (OSError, ValueError, KeyError, BadZipFile):
            continue


# --- pages ------------------------------------------------------------------------------

READING = """Mean ± standard error over seeds. Δ: difference to lambda 0 over the seeds that both have, with the
95% interval of a paired t test. Best of a row in bold: highest for tokens per second, lowest for all else. On
benchmarks the best of a task; ± of a single run is the standard error over examples; mean and mean rank are of the
tasks that all rows have, the mean of those of which more is better."""


@dataclass
class Report:
    """All that the pages show, as text."""

    title: str
    facts: list[str]
    tables: dict[str, tuple[list[str], dict[str, list[Cell]]]]  # name -> heads of the columns, row -> cells
    figures: list[tuple[str, Path]]
    runs: list[dict[str, str]]  # a row of runs.csv each


def gather(folder: Path, target: Path) -> Report:
    """Read the runs of `folder`, draw into `target`/figures."""
    runs, defaults = read_runs(folder), default_config()
    rows = make_rows(runs)
    lambdas = sorted({disp for row in rows for disp in row.cells})
    counts = Counter(run.status for run in runs)
    facts = [f"{len(runs)} runs: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))]
    try:
        task = OmegaConf.load(folder / "multirun.yaml").hydra.overrides.task
        facts.append("the sweep: " + shlex.join(["python", "train.py", "-m", *task]))
    except (OSError, YAMLError, OmegaConfBaseException, AttributeError, TypeError):
        pass  # it was not one sweep of Hydra's
    varied, head = differences(runs), ["lambda", *(f"{disp:g}" for disp in lambdas)]
    tables = {
        quantity.name: (head, dict(zip((row.label for row in rows), make_table(rows, key, lambdas), strict=True)))
        for key, quantity in QUANTITIES.items()
    }
    if layers := make_layer_table(rows):
        tables["mean cosine by layer"] = (["layer", *map(str, range(len(next(iter(layers.values())))))], layers)
    heads, benchmarks = make_task_table(rows, [run for run in runs if run.is_imported])
    if benchmarks:
        tables["benchmarks"] = (["task", *heads], benchmarks)
    return Report(
        title=str(folder),
        facts=facts,
        tables=tables,
        figures=draw(rows, runs, target / "figures"),
        runs=[
            {
                "run": run.folder.name,
                "status": run.status,
                "problem": run.problem,
                "step": str(run.step),
                "total_steps": str(run.total_steps),
                "parameters": str(run.n_parameters),
                **{key: quantity.show(run.numbers.get(key)) for key, quantity in QUANTITIES.items()},
                "mean_cosine_by_layer": " ".join(
                    QUANTITIES["mean_cosine"].show(mean) for means in run.cosines[-1:] for mean in means
                ),
                "differs": " ".join(
                    f"{key}={hydra_value(by_run[run.folder])}" for key, by_run in varied.items() if run.folder in by_run
                ),
                "command": command_of(run, defaults) if run.config else "",
            }
            for run in runs
        ],
    )


def to_markdown(report: Report, folder: Path) -> str:
    """The page for reading in a terminal, or to paste into an issue."""
    plain = lambda text: text.replace("|", "\\|").replace("<", "&lt;")  # noqa: E731
    lines = [f"# {plain(report.title)}", "", *(f"- {plain(fact)}" for fact in report.facts), "", READING]
    for name, (head, table) in report.tables.items():
        lines += ["", f"## {name.capitalize()}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for label, cells in table.items():
            texts = [
                (f"**{cell.text}**" if cell.best else cell.text) + f" {cell.difference}".rstrip() for cell in cells
            ]
            lines.append(f"| {plain(label)} | " + " | ".join(texts) + " |")
    for caption, path in report.figures:
        lines += ["", f"![{caption}]({path.with_suffix('.png').relative_to(folder).as_posix()})", "", f"{caption}."]
    lines += ["", "## Runs"]
    for run in report.runs:
        lines += ["", f"- {plain(run['run'])}: {run['status']} {plain(run['problem'])}".rstrip()]
        lines += [f"  - `{run[key]}`" for key in ("differs", "command") if run[key]]
    return "\n".join(lines) + "\n"


PAGE = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def to_html(report: Report) -> str:
    """One page that needs nothing but itself."""
    text = html.escape
    tables, pictures, runs = [], [], []
    for name, (head, table) in report.tables.items():
        body = "<tr>" + "".join(f"<th>{text(value)}</th>" for value in head) + "</tr>\n"
        for label, cells in table.items():
            body += f"<tr><td>{text(label)}</td>"
            for value, cell in zip(head[1:], cells, strict=True):
                mark = " class=best" if cell.best else ""
                column, difference = text(f"{head[0]} {value}"), text(cell.difference).replace(" [", " <br>[")
                body += f'<td{mark} data-column="{column}">{text(cell.text)}<small>{difference}</small></td>'
            body += "</tr>\n"
        tables.append(f"<h2>{text(name.capitalize())}</h2><div class=table><table>{body}</table></div>")
    for caption, path in report.figures:
        data = base64.b64encode(path.read_bytes()).decode()
        source = f"data:image/svg+xml;base64,{data}"
        wide = " class=wide" if path.stem.startswith(("training", "density")) else ""
        pictures.append(
            f'<figure{wide}><img alt="{text(caption)}" src="{source}">'
            f"<figcaption>{text(caption)}.</figcaption></figure>"
        )
    for run in report.runs:
        runs.append(
            f"<article><b>{text(run['run'])}</b> <span class={run['status']}>{run['status']}</span> "
            f"{text(run['problem'])}"
            f"<small>{text(run['differs'])}</small><code>{text(run['command'])}</code></article>"
        )
    return PAGE.substitute(
        title=text(report.title),
        facts="".join(f"<p>{text(fact)}</p>" for fact in report.facts),
        reading=text(READING),
        tables="\n".join(tables),
        figures="\n".join(pictures),
        runs="\n".join(runs),
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise UserError("give one folder of runs: python -m nanodisp.report out/<sweep>")
    folder = Path(argv[0])
    target = folder / "report"
    report = gather(folder, target)
    try:
        target.mkdir(exist_ok=True)
        (target / "index.html").write_text(to_html(report), encoding="utf-8")
        (target / "report.md").write_text(to_markdown(report, target), encoding="utf-8")
        with (target / "runs.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(report.runs[0]))
            table.writeheader()
            table.writerows(report.runs)
    except OSError as error:
        raise UserError(f"{target} can not be written: {error}") from error
    print(*report.facts, f"wrote {target}/index.html, report.md and runs.csv", sep="\n")


if __name__ == "__main__":
    arguments.run(main)
