"""A folder of runs becomes an answer on one page.

    python -m nanodisp.report out/<sweep>

writes into out/<sweep>/report: index.html (self-contained), report.md, runs.csv and figures/.

Seeds are grouped: runs that differ in their seed alone are one cell of the tables. Rows are model
sizes (and whatever else the sweep varied), columns are lambda. Without dispersion its other
settings mean nothing, so a run at lambda 0 is what all rows of its kind are compared with.
Every number that is shown anywhere comes from `Run.numbers` and goes through `Quantity.show`.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import json
import math
import re
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import Any
from zipfile import BadZipFile

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp import arguments, checkpoint, figures
from nanodisp.condensation import trend
from nanodisp.config import CONF, NOT_IDENTITY, Config
from nanodisp.errors import UserError
from nanodisp.gpt import GPT, GPTConfig

LAMBDA = "dispersion.lambda_disp"
SHAPE = ("model.n_layer", "model.n_embd", "model.n_head", "model.block_size")  # told by a row's size
MOST_LINES = 12  # of one figure
NOTHING = "\N{EN DASH}"  # in place of a number that there is not


@dataclass(frozen=True)
class Quantity:
    """A number that the report tells of a run: its name, how it is written, and which value is best."""

    name: str
    form: str
    best: Callable[[list[float]], float] = min

    def show(self, value: float | None, signed: bool = False) -> str:
        if value is None or not math.isfinite(value):
            return NOTHING
        return format(value, ("+" if signed else "") + self.form).replace("-", "\N{MINUS SIGN}")


QUANTITIES = {
    "loss": Quantity("validation loss, nats per token", ".4f"),
    "bpb": Quantity("bits per byte", ".4f"),
    "mean_cosine": Quantity("mean cosine, last layer", ".4f"),
    "rho": Quantity("rho, mean cosine against depth", ".3f"),
    "tau": Quantity("tau, mean cosine against depth", ".3f"),
    "tokens_per_second": Quantity("tokens per second", ",.0f", max),
}


# --- reading runs -----------------------------------------------------------------------


@dataclass
class Run:
    """One run, as far as it can be read.

    status: "finished", "unfinished", or "failed" for a run with an `error.txt`, a loss that is
        not a number, or files that can not be read; `problem` says what.
    config: keys with dots -> values; empty when it can not be read.
    numbers: the `QUANTITIES` of its last validation.
    steps, cosines: [S] and [S, L + 1], the mean cosine by layer of every validation.
    """

    folder: Path
    status: str = "unfinished"
    problem: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    n_parameters: int = 0
    step: int = 0
    total_steps: int = 0
    numbers: dict[str, float | None] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    cosines: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def size(self) -> str:
        return f"{_short(self.n_parameters)} ({self.config['model.n_layer']} x {self.config['model.n_embd']})"


def read_runs(folder: Path) -> list[Run]:
    """All runs in `folder`, by name; raises UserError when there is none."""
    marks = ("config.yaml", "metrics.jsonl", "error.txt", "checkpoints")
    found = sorted(f for f in folder.glob("*") if any((f / mark).exists() for mark in marks))
    if not found:
        raise UserError(f"{folder} holds no run: give the folder of a sweep, such as out/lambda")
    return [read_run(f) for f in found]


def read_run(folder: Path) -> Run:
    """One run; whatever is wrong with its files is told in `problem`, never raised."""
    run = Run(folder)
    try:
        run.config = flatten(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        model = {key[6:]: value for key, value in run.config.items() if key.startswith("model.")}
        run.n_parameters = count_parameters(GPTConfig(**model))
        run.total_steps = count_steps(run.config, run.n_parameters)
        float(run.config[LAMBDA]), int(run.config["seed"])
        read_metrics(run)
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError, KeyError, AttributeError) as error:
        run.status, run.problem = "failed", "can not be read: " + str(error).strip().split("\n")[0]
    error_file = folder / "error.txt"
    if error_file.is_file():
        run.status, run.problem = "failed", error_file.read_text(errors="replace").strip().split("\n")[-1]
    return run


def read_metrics(run: Run) -> None:
    """Numbers and status from metrics.jsonl; lines that are no whole record are passed over."""
    path, records = run.folder / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            records.append((record["split"], int(record["step"]), record))
        except (ValueError, TypeError, KeyError):
            continue
    saved = [int(path.name[5:]) for path in checkpoint.all_checkpoints(run.folder / "checkpoints")]
    run.step = max([*saved, *(step for _, step, _ in records)], default=0)
    bad = [step for _, step, record in records if not isinstance(record.get("loss"), (int, float))]
    validations = [(step, record) for split, step, record in records if split == "val" and step not in bad]
    if bad:
        run.status, run.problem = "failed", f"the loss is not a number at step {bad[0]}"
    elif validations and validations[-1][0] >= run.total_steps:
        run.status = "finished"
    else:
        run.problem = f"at step {run.step} of {run.total_steps}"
    if not validations:
        return
    curves = [(step, record["mean_cosine"]) for step, record in validations if record.get("mean_cosine")]
    run.steps = np.array([step for step, _ in curves])
    run.cosines = np.array([means for _, means in curves], dtype=np.float64)
    last = validations[-1][1]
    speeds = [speed for _, _, record in records if (speed := record.get("tokens_per_second"))]
    rho, tau = trend(last["mean_cosine"])
    run.numbers = {
        "loss": last["loss"],
        "bpb": last["bpb"],
        "mean_cosine": last["mean_cosine"][-1],
        "rho": rho,
        "tau": tau,
        "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,  # the first one warms up
    }


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 6}} -> {"model.n_layer": 6}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}{name}.").items()}


def count_parameters(config: GPTConfig) -> int:
    return _count_parameters(dataclasses.astuple(config))


@lru_cache
def _count_parameters(shape: tuple[Any, ...]) -> int:
    with torch.device("meta"):
        return GPT(GPTConfig(*shape)).num_parameters()


def count_steps(config: dict[str, Any], n_parameters: int) -> int:
    """The budget in steps, by the rule of train.py."""
    tokens = config["train.tokens"]
    if tokens is None and config["train.tokens_per_param"] is not None:
        tokens = config["train.tokens_per_param"] * n_parameters
    if tokens is None:
        return config["train.steps"]
    return math.ceil(tokens / (config["train.batch_size"] * config["model.block_size"]))


def differences(runs: Sequence[Run]) -> dict[str, dict[Path, Any]]:
    """The keys that differ among the runs, each with the values by run folder; what does not decide a result aside."""
    readable = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in readable for key in run.config)
    values = {key: {run.folder: run.config.get(key) for run in readable} for key in keys if not _is_aside(key)}
    return {key: by_run for key, by_run in values.items() if len({json.dumps(v) for v in by_run.values()}) > 1}


def _is_aside(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in NOT_IDENTITY.get(section, ()) or section in NOT_IDENTITY[""]


def command_of(run: Run, defaults: dict[str, Any]) -> str:
    """A command that makes this run: what differs from the defaults, spelled out."""
    changed = {key: value for key, value in run.config.items() if key not in defaults or defaults[key] != value}
    return shlex.join(["python", "train.py", *(f"{key}={_hydra_value(value)}" for key, value in changed.items())])


def _hydra_value(value: Any) -> str:
    """A value as Hydra's override grammar spells it; backslashes count there only before a quote."""
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    if re.fullmatch(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_./][\w./-]*", value, re.IGNORECASE | re.ASCII):
        return value
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + (r"\'" if m[2] else ""), value) + "'"


def default_config() -> dict[str, Any]:
    """What `python train.py` runs, flattened."""
    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return flatten(OmegaConf.to_container(hydra.compose("config")))


# --- tables -----------------------------------------------------------------------------


@dataclass
class Row:
    """Runs of one kind: lambda -> seed -> the finished run."""

    label: str
    cells: dict[float, dict[int, Run]]

    def values(self, disp: float, quantity: str) -> dict[int, float]:
        """The seeds' values that there are."""
        numbers = {seed: run.numbers.get(quantity) for seed, run in self.cells.get(disp, {}).items()}
        return {seed: value for seed, value in numbers.items() if value is not None and math.isfinite(value)}


@dataclass
class Cell:
    """What a table shows: mean ± standard error, the difference to lambda 0, whether it is the row's best."""

    text: str
    difference: str = ""
    best: bool = False


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """Group finished runs; of two with the same configuration and seed the later name counts."""
    finished = [run for run in runs if run.status == "finished"]
    varied = [key for key in differences(finished) if key not in (LAMBDA, "seed", *SHAPE)]
    kinds: dict[Any, dict[float, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    baselines: dict[Any, dict[int, Run]] = defaultdict(dict)

    def parts(run: Run, of_dispersion: bool) -> str:
        keys = [key for key in varied if key.startswith("dispersion.") == of_dispersion]
        return ", ".join(f"{key.split('.')[-1]}={_hydra_value(run.config.get(key))}" for key in keys)

    for run in finished:
        base = (run.n_parameters, run.size, parts(run, of_dispersion=False))
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


def make_table(rows: Sequence[Row], key: str, lambdas: Sequence[float]) -> list[list[Cell]]:
    """A row of cells per row of runs, a cell per lambda."""
    quantity, table = QUANTITIES[key], []
    for row in rows:
        values = {disp: row.values(disp, key) for disp in lambdas}
        means = {disp: statistics.fmean(there.values()) for disp, there in values.items() if there}
        best = quantity.best(list(means.values())) if len(means) > 1 else None
        cells = []
        for disp in lambdas:
            if disp not in means:
                cells.append(Cell(NOTHING))
                continue
            error = figures.standard_error(list(values[disp].values()))
            text = quantity.show(means[disp]) + (f" ± {quantity.show(error)}" if math.isfinite(error) else "")
            cells.append(
                Cell(text, _difference(quantity, values[disp], values.get(0.0, {}), disp), means[disp] == best)
            )
        table.append(cells)
    return table


def paired_interval(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float]:
    """Mean of value - baseline over the shared seeds, and half the width of its 95% t interval.

    NaN for a mean without shared seeds, and for a width with fewer than two.
    """
    from scipy import stats

    gaps = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not gaps:
        return math.nan, math.nan
    return statistics.fmean(gaps), float(stats.t.ppf(0.975, len(gaps) - 1)) * figures.standard_error(gaps)


def _difference(quantity: Quantity, values: dict[int, float], baseline: dict[int, float], disp: float) -> str:
    gap, half = paired_interval(values, baseline)
    if disp == 0 or not math.isfinite(gap):
        return ""
    interval = f" [{quantity.show(gap - half, True)}, {quantity.show(gap + half, True)}]" if math.isfinite(half) else ""
    return f"Δ {quantity.show(gap, True)}{interval}"


def _short(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n:,}"


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
            label: (seeds[0].steps, np.mean([run.cosines for run in seeds], axis=0)) for label, seeds in lines.items()
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
95% interval of a paired t test. Best of a row in bold: highest for tokens per second, lowest for all else."""


@dataclass
class Report:
    """All that the pages show, as text."""

    title: str
    facts: list[str]
    lambdas: list[str]
    tables: dict[str, dict[str, list[Cell]]]  # quantity -> row -> cells
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
    varied = differences(runs)
    return Report(
        title=str(folder),
        facts=facts,
        lambdas=[f"{disp:g}" for disp in lambdas],
        tables={
            quantity.name: {row.label: cells for row, cells in zip(rows, make_table(rows, key, lambdas), strict=True)}
            for key, quantity in QUANTITIES.items()
        },
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
                "differs": " ".join(
                    f"{key}={_hydra_value(by_run[run.folder])}"
                    for key, by_run in varied.items()
                    if run.folder in by_run
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
    for name, table in report.tables.items():
        lines += ["", f"## {name.capitalize()}", "", "| lambda | " + " | ".join(report.lambdas) + " |"]
        lines.append("| --- |" + " --- |" * len(report.lambdas))
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


PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #666; --line: #d5d5d5; --mark: #e8f1ea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #161616; --faint: #a0a0a0; --line: #3c3c3c; --mark: #24392b; } }
@media print {
  :root { --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; --mark: #eee; }
  body { font-size: 8pt; } td, th { padding: 2px 4px !important; } figure, tr, article { break-inside: avoid; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1, h2, p, li, article { overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; white-space: normal; min-width: 6rem; }
.best { font-weight: bold; background: var(--mark); }
small, .faint { color: var(--faint); font-weight: normal; display: block; font-size: .8em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
.wide { grid-column: 1 / -1; max-width: 56rem; } figure img { width: 100%; background: #fff; border-radius: 4px; }
article { border-bottom: 1px solid var(--line); padding: .5rem 0; }
code { font-size: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
@media screen and (max-width: 48rem) {  /* a table's row becomes a list: nothing to scroll sideways for */
  tr, td { display: block; } tr:first-child { display: none; } td:first-child { font-weight: bold; }
  td { display: flex; flex-wrap: wrap; justify-content: space-between; white-space: normal; padding: .3rem; }
  td[data-lambda]::before { content: "lambda " attr(data-lambda); color: var(--faint); }
  small { width: 100%; } small br { display: none; } }
.failed, .unfinished { border: 1px solid; border-radius: 3px; padding: 0 .3rem; }
</style>
<h1>$title</h1>
$facts
<p class="faint">$reading</p>
$tables
<h2>Figures</h2>
<div class="figures">$figures</div>
<h2>Runs</h2>
$runs
</html>
""")


def to_html(report: Report) -> str:
    """One page that needs nothing but itself."""
    text = html.escape
    tables, pictures, runs = [], [], []
    for name, table in report.tables.items():
        head = "".join(f"<th>{text(value)}</th>" for value in ("lambda", *report.lambdas))
        body = ""
        for label, cells in table.items():
            body += f"<tr><td>{text(label)}</td>"
            for value, cell in zip(report.lambdas, cells, strict=True):
                mark = " class=best" if cell.best else ""
                difference = text(cell.difference).replace(" [", " <br>[")
                body += f'<td{mark} data-lambda="{value}">{text(cell.text)}<small>{difference}</small></td>'
            body += "</tr>\n"
        tables.append(
            f"<h2>{text(name.capitalize())}</h2><div class=table><table><tr>{head}</tr>\n{body}</table></div>"
        )
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
