"""The report: a folder of runs becomes tables, figures and one page."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from nanodisp.condensation import figures
from nanodisp.errors import UserError
from nanodisp.report import __main__ as report
from nanodisp.report import draw
from nanodisp.report.tables import (
    QUANTITIES,
    make_layer_tables,
    make_rows,
    make_table,
    make_task_table,
    paired_interval,
    quantities_of,
)
from nanodisp.runs.read import read_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(sweep: Path) -> Path:
    report.main([str(sweep)])
    return sweep / "report"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time: for tests of what is written beside the figures."""
    monkeypatch.setattr(report, "draw", lambda *_: [])


# --- tables ---------------------------------------------------------------------------------


def test_a_cell_is_the_mean_and_standard_error_over_seeds(sweep: Path) -> None:
    rows = make_rows(read_runs(sweep))
    assert [list(row.cells) for row in rows] == [[0.0, 0.1, 1.0]]
    none, tenth, one = make_table(rows, "loss", QUANTITIES["loss"], [0.0, 0.1, 1.0])[0]
    assert none.text == f"2.0200 ± {0.01 / math.sqrt(3):.4f}"
    assert (none.difference, none.best) == ("", False)
    assert tenth.best
    assert not one.best
    assert one.text.startswith("2.3150 ±"), "the unfinished seed is left out"
    assert one.difference.startswith("Δ +0.3000 ["), "and the others are compared with the same two seeds"


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 9), st.floats(-5, 5), min_size=2), st.integers(0, 99))
def test_the_interval_is_that_of_a_paired_t_test(values: dict[int, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    baseline = {key: float(rng.normal()) for key in values} | {100: 0.0}
    mean, half = paired_interval({**values, 200: 1.0}, baseline)
    keys = sorted(values)
    test = stats.ttest_rel([values[key] for key in keys], [baseline[key] for key in keys]).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((test.low, test.high))


def test_one_seed_has_a_difference_but_no_interval() -> None:
    mean, half = paired_interval({1: 2.0}, {1: 1.5})
    assert mean == 0.5
    assert math.isnan(half)
    assert math.isnan(paired_interval({1: 2.0}, {2: 1.5})[0])


def test_variants_are_rows_that_share_the_baseline(tmp_path: Path) -> None:
    write_run(tmp_path / "off", "dispersion=off", "dispersion.tau=3", loss=3.0)
    for variant, loss in (("angular", 2.0), ("cosine", 4.0)):
        write_run(tmp_path / variant, f"dispersion={variant}", loss=loss)
    write_run(tmp_path / "wide", "dispersion=off", "model.d_ff=200", loss=1.0)
    rows = make_rows(read_runs(tmp_path))
    tables = {row.label: make_table([row], "loss", QUANTITIES["loss"], [0.0, 0.1])[0] for row in rows}
    table = {label: [cell.text for cell in cells] for label, cells in tables.items()}
    found = {re.sub(r".*\), d_ff=(\w+)(, variant=(\w+))?.*", r"\1 \3", label): cells for label, cells in table.items()}
    assert found == {
        "null angular": ["3.0000", "2.0000"],
        "null cosine": ["3.0000", "4.0000"],
        "200 ": ["1.0000", "\N{EN DASH}"],
    }


def test_architectures_are_rows_under_their_names_and_a_figure_per_lambda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "MOST_LINES", 3)
    switches = {"GPT-2": "none", "GPT-2, position=rotary": "rotary", "GPT-2, norm=rmsnorm": "rmsnorm"}
    for disp in (0, 0.1):
        for switch in switches.values():
            run = tmp_path / f"{switch}-{disp}"
            write_run(run, "experiment=architecture", f"switch={switch}", f"dispersion.lambda_disp={disp}")
    drawn: list[list[str]] = []
    monkeypatch.setattr(figures, "mean_by_layer", lambda lines: drawn.append(list(lines)) or Figure())
    for other in ("against_lambda", "losses", "over_training"):
        monkeypatch.setattr(figures, other, lambda *_: Figure())
    report.main([str(tmp_path)])
    rows = make_rows(read_runs(tmp_path))
    assert {row.label.split("), ")[1] for row in rows} == set(switches)
    assert all(list(row.cells) == [0.0, 0.1] for row in rows)
    assert drawn == [[f"{row.label}, lambda {disp}" for row in rows] for disp in ("0", "0.1")]


@pytest.mark.usefixtures("no_figures")
def test_layers_are_averaged_over_the_seeds_of_the_last_validation(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"s{seed}", f"seed={seed}", "dispersion=off")
    write_run(tmp_path / "deep", "model.n_layer=3")  # one layer more than its records have
    metrics = tmp_path / "s2" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("[0.1, 0.2,", "[0.1, -0.4,"))
    report.main([str(tmp_path)])
    page, markdown = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    table = markdown.split("## Mean cosine by layer\n\n")[1].split("\n\n")[0].splitlines()
    assert table[:2] == ["| layer | 0 | 1 | 2 |", "| --- | --- | --- | --- |"]
    assert [line.split(", lambda ")[1] for line in table[2:]] == ["0 | 0.1000 | \N{MINUS SIGN}0.1000 | 0.3400 |"]
    assert '<td data-column="layer 1">\N{MINUS SIGN}0.1000<' in page
    with (tmp_path / "report" / "runs.csv").open(newline="") as file:
        by_run = {line["run"]: line["mean_cosine_by_layer"] for line in csv.DictReader(file)}
    assert by_run["s2"] == "0.1 -0.4 0.33999999999999997"


def test_a_shallower_model_has_fewer_layers_in_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "two")
    folder = write_run(tmp_path / "three", "model.n_layer=3")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("[0.1,", "[0.0, 0.1,"))
    table = make_layer_tables(make_rows(read_runs(tmp_path)))["mean_cosine"]
    assert sorted([cell.text for cell in cells] for cells in table.values()) == [
        ["0.0000", "0.1000", "0.2000", "0.3400"],
        ["0.1000", "0.2000", "0.3400", "\N{EN DASH}"],
    ]


def test_runs_of_an_older_version_share_the_row_of_newer_ones(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"s{seed}", f"seed={seed}", "dispersion.schedule=warmup")
    config = tmp_path / "s1" / "config.yaml"
    config.write_text(config.read_text().replace("schedule: warmup", "schedule: linear"))
    (row,) = make_rows(read_runs(tmp_path))
    assert list(row.cells[0.1]) == [1, 2]


@pytest.mark.usefixtures("no_figures")
def test_figures_that_nanodisp_does_not_know_are_reported_by_name(tmp_path: Path) -> None:
    for seed in (1, 2):
        metrics = write_run(tmp_path / f"s{seed}", f"seed={seed}", "dispersion=off") / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[-1] |= {"spread": [1.0, None, float(seed)], "surprise": seed / 2}
        lines[-2] |= {"penalty": 0.25}
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = make_rows(read_runs(tmp_path))
    added = {key: quantity for key, quantity in quantities_of(rows).items() if key not in QUANTITIES}
    assert list(added) == ["surprise", "penalty, training"]
    (cell,) = make_table(rows, "surprise", added["surprise"], [0.0])[0]
    assert (cell.text, cell.best) == ("0.7500 ± 0.2500", False)
    (cells,) = make_layer_tables(rows)["spread"].values()
    assert [cell.text for cell in cells] == ["1.0000", "\N{EN DASH}", "1.5000"], "null is a value that is not finite"
    report.main([str(tmp_path)])
    with (tmp_path / "report" / "runs.csv").open(newline="") as file:
        line = next(csv.DictReader(file))
    assert [line[key] for key in ("surprise", "penalty, training", "spread_by_layer")] == ["0.5", "0.25", "1.0  1.0"]
    assert "## Surprise\n" in (tmp_path / "report" / "report.md").read_text()


def test_sizes_are_ordered_by_their_parameters(tmp_path: Path) -> None:
    write_run(tmp_path / "a-large", "model.n_embd=32")
    write_run(tmp_path / "b-small")
    labels = [row.label for row in make_rows(read_runs(tmp_path))]
    assert [label.split("(")[1] for label in labels] == ["2 x 16)", "2 x 32)"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("loss", 1.23456, "1.2346"),
        ("rho", -1.0, "\N{MINUS SIGN}1.000"),
        ("tokens_per_second", 12345.6, "12,346"),
        ("bpb", None, "\N{EN DASH}"),
        ("tau", math.nan, "\N{EN DASH}"),
    ],
)
def test_format_of_numbers(key: str, value: float | None, text: str) -> None:
    assert QUANTITIES[key].show(value) == text


def test_the_loss_of_decoders_and_the_masked_loss_of_encoders_are_never_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for disp in (0, 1):
        for seed in (1, 2):
            settings = (f"dispersion.lambda_disp={disp}", f"seed={seed}")
            write_run(tmp_path / f"decoder{disp}{seed}", *settings, loss=3.0 + disp)
            write_run(tmp_path / f"encoder{disp}{seed}", *settings, "model.causal=false", loss=2.0 + disp)
    drawn: dict[str, list[str]] = {}
    against = lambda lines, quantity: drawn.update({quantity: list(lines)}) or Figure()  # noqa: E731
    monkeypatch.setattr(figures, "against_lambda", against)
    monkeypatch.setattr(figures, "losses", against)
    report.main([str(tmp_path)])
    labels = [row.label for row in make_rows(read_runs(tmp_path))]
    decoder, encoder = labels
    assert encoder.endswith("causal=false") and not decoder.endswith("causal=false")
    assert drawn["validation loss, nats per token"] == [decoder]
    assert drawn["masked validation loss, nats per masked token"] == [encoder]
    assert drawn["tokens per second"] == labels
    assert len(drawn["loss, nats per token"]) == len(drawn["masked loss, nats per masked token"]) == 4
    assert not set(drawn["loss, nats per token"]) & set(drawn["masked loss, nats per masked token"])
    sections = (tmp_path / "report" / "report.md").read_text().split("\n## ")
    tables = {section.splitlines()[0]: section for section in sections}
    for name, row, other, best in (
        ("Validation loss, nats per token", decoder, encoder, "3.0000"),
        ("Bits per byte", decoder, encoder, "6.0000"),
        ("Masked validation loss, nats per masked token", encoder, decoder, "2.0000"),
    ):
        assert f"| {row} | **{best} " in tables[name] and other not in tables[name]
    with (tmp_path / "report" / "runs.csv").open(newline="") as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert [lines["encoder02"][key] for key in ("loss", "bpb", "masked_loss")] == ["", "", "2.0"]
    assert [lines["decoder02"][key] for key in ("loss", "bpb", "masked_loss")] == ["3.0", "6.0", ""]


@pytest.mark.usefixtures("no_figures")
def test_a_folder_of_encoders_has_no_table_of_the_loss_of_decoders(tmp_path: Path) -> None:
    write_run(tmp_path / "encoder", "model.causal=false")
    write_run(tmp_path / "diverged", "model.causal=false", "seed=2", loss=None)
    report.main([str(tmp_path)])
    page = (tmp_path / "report" / "report.md").read_text()
    assert "1 failed, 1 finished" in page and "diverged: failed the loss is not a number at step 0" in page
    assert "## Masked validation loss" in page and "## Validation loss" not in page and "## Bits" not in page


# --- benchmarks -------------------------------------------------------------------------------


def write_evaluation(run: Path, examples: int = 100, shots: int = 0, **accuracies: float) -> None:
    """evaluation.json: accuracies by task, and the perplexity of a text."""
    metrics: dict[str, dict[str, object]] = {
        name: {"acc_norm": figure(0.0), "acc": figure(accuracy, 0.03)} for name, accuracy in accuracies.items()
    }
    metrics["text"] = {"perplexity": {**figure(10 * accuracies["easy"]), "higher_is_better": False}}
    tasks = {name: {"metrics": values, "shots": shots, "examples": examples} for name, values in metrics.items()}
    (run / "evaluation.json").write_text(json.dumps({"model": "run at step 40", "tasks": tasks}))


def figure(value: float, stderr: float | None = None) -> dict[str, object]:
    return {"value": value, "stderr": stderr, "higher_is_better": True}


def test_benchmarks_have_a_row_per_lambda_and_a_column_per_task(tmp_path: Path) -> None:
    for disp, seed, easy, hard in ((0, 1, 0.5, 0.25), (0, 2, 0.7, 0.5), (1, 1, 0.8, 0.375)):
        run = write_run(tmp_path / f"disp{disp}-s{seed}", f"dispersion.lambda_disp={disp}", f"seed={seed}")
        write_evaluation(run, easy=easy, hard=hard)
    write_run(tmp_path / "not-evaluated", "dispersion.lambda_disp=3", "seed=1")
    heads, table = make_task_table(make_rows(read_runs(tmp_path)))
    about = "0-shot, 100 examples"
    tasks = [f"easy, acc, {about}", f"hard, acc, {about}", f"text, perplexity, {about}"]
    assert heads == [*tasks, "mean of 2", "mean rank of 3"]
    none, one = table.values()
    assert [label.split(", ")[-1] for label in table] == ["lambda 0", "lambda 1"]
    over_seeds = ["0.6000 ± 0.1000", "0.3750 ± 0.1250", "6.0000 ± 1.0000", "0.4875 ± 0.1125", "1.50"]
    assert [cell.text for cell in none] == over_seeds
    over_examples = ["0.8000 ± 0.0300", "0.3750 ± 0.0300", "8.0000", "0.5875 ± 0.0212", "1.50"]
    assert [cell.text for cell in one] == over_examples
    assert [cell.best for cell in none] == [False, True, True, False, False]
    assert [cell.best for cell in one] == [True, True, False, False, False]
    assert all(cell.difference == "" for cell in none)
    gaps = ["Δ +0.3000", "Δ +0.1250", "Δ +3.0000", "Δ +0.2125", ""]  # to seed 1 alone: no interval
    assert [cell.difference for cell in one] == gaps


def test_differences_of_benchmarks_are_paired_by_seed_and_drawn_against_lambda(tmp_path: Path) -> None:
    for disp, seed, easy in ((0, 1, 0.5), (0, 2, 0.7), (0, 3, 0.1), (1, 2, 0.8), (1, 1, 0.5), (1, 4, 0.9)):
        run = write_run(tmp_path / f"disp{disp}-s{seed}", f"dispersion.lambda_disp={disp}", f"seed={seed}")
        write_evaluation(run, easy=easy)
    _, table = make_task_table(make_rows(read_runs(tmp_path)))
    one = list(table.values())[1][0]
    half = 12.7062 * 0.05  # t of one degree of freedom times the standard error of the gaps 0 and 0.1
    assert one.difference == f"Δ +0.0500 [\N{MINUS SIGN}{half - 0.05:.4f}, +{half + 0.05:.4f}]"
    report.main([str(tmp_path)])
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert one.difference in markdown
    assert "easy, acc, 0-shot, 100 examples, against lambda" in markdown
    assert (tmp_path / "report" / "figures" / "task_1.svg").is_file()


def test_other_settings_of_a_task_are_other_columns_and_not_in_the_mean(tmp_path: Path) -> None:
    for number, (examples, shots) in enumerate(((100, 0), (10, 0), (100, 5))):
        run = write_run(tmp_path / f"run{number}", f"dispersion.lambda_disp={number}")
        write_evaluation(run, examples, shots, easy=0.5)
    heads, table = make_task_table(make_rows(read_runs(tmp_path)))
    assert len(heads) == 6 + 2
    assert all([cell.text for cell in cells].count("\N{EN DASH}") == 4 + 2 for cells in table.values())


def test_an_evaluation_of_another_step_is_left_out_and_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_evaluation(run, easy=0.5)
    text = (run / "evaluation.json").read_text()
    (run / "evaluation.json").write_text(text.replace("step 40", "step 4"))
    (read,) = read_runs(tmp_path)
    assert (read.status, read.tasks) == ("finished", {})
    assert read.problem == "evaluation.json is of run at step 4, but the run is at step 40: evaluate it again"


@pytest.mark.usefixtures("no_figures")
def test_an_imported_model_has_a_row_beside_its_trained_versions(tmp_path: Path) -> None:
    write_evaluation(write_run(tmp_path / "trained", "init_from=hf:gpt2"), easy=0.5)
    released = write_run(tmp_path / "gpt2", "init_from=hf:gpt2", "data=shards")
    (released / "metrics.jsonl").unlink()
    write_evaluation(released, easy=0.75)
    text = (released / "evaluation.json").read_text()
    (released / "evaluation.json").write_text(text.replace("run at step 40", "gpt2 at step 0"))
    report.main([str(tmp_path)])
    table = (tmp_path / "report" / "report.md").read_text().split("## Benchmarks")[1]
    assert "| gpt2, imported | **0.7500 ± 0.0300**" in table
    assert "lambda 0.1 | 0.5000 ± 0.0300" in table


@pytest.mark.usefixtures("no_figures")
def test_the_page_shows_benchmarks_and_reports_a_damaged_file(tmp_path: Path) -> None:
    write_evaluation(write_run(tmp_path / "intact", "seed=1"), easy=0.5)
    for number, damage in enumerate(('{"tas', '{"tasks": {"easy": {"metrics": {}}}}', "[]", '{"tasks": {"easy": 1}}')):
        (write_run(tmp_path / f"damaged{number}", f"seed={number + 2}") / "evaluation.json").write_text(damage)
    report.main([str(tmp_path)])
    markdown = (tmp_path / "report" / "report.md").read_text()
    page = (tmp_path / "report" / "index.html").read_text()
    assert "easy, acc, 0-shot, 100 examples" in markdown and "easy, acc, 0-shot, 100 examples" in page
    assert "0.5000 ± 0.0300" in markdown and "0.5000 ± 0.0300" in page
    assert "5 runs: 5 finished" in page
    assert markdown.count("is not what nanodisp.evaluate writes") == 4


# --- pages ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads, and which tags it does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_and_self_contained(pages: Path) -> None:
    text = (pages / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert text.count("<svg role=img") == text.count("<figure") == 10
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", text)
    assert "UserError: &lt;b&gt;no space&lt;/b&gt; &amp; more" in text
    assert "12 runs: 3 failed, 8 finished, 1 unfinished" in text


def test_every_number_of_the_page_is_in_the_markdown(pages: Path) -> None:
    numbers = r"\d\.\d{3,4} ± \d\.\d{3,4}"
    markdown = (pages / "report.md").read_text()
    assert re.findall(numbers, (pages / "index.html").read_text()) == re.findall(numbers, markdown) != []
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (pages / picture).stat().st_size > 1000


def test_the_csv_has_a_line_per_run(pages: Path, sweep: Path) -> None:
    with (pages / "runs.csv").open(newline="") as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert set(lines) == {run.folder.name for run in read_runs(sweep)}
    assert lines["disp0.1-s2"]["loss"] == "1.92"
    assert lines["nan"]["loss"] == ""
    plain = r"-?\d+(\.\d+)?(e[-+]\d+)?|"  # what float() and a spreadsheet read
    assert all(re.fullmatch(plain, line[key]) for line in lines.values() for key in (*QUANTITIES, "parameters", "step"))
    assert lines["disp0.1-s2"]["mean_cosine"] == str(0.3 + 40 / 1000), "in full precision"
    assert (lines["disp0.1-s2"]["parameters"], lines["disp0.1-s2"]["tokens_per_second"]) == ("10960", "4000.0")
    assert lines["disp0.1-s2"]["differs"] == "dispersion.lambda_disp=0.1 seed=2"
    assert all(line["command"] == "" for line in lines.values()), "these runs were not launched by a command"


@pytest.mark.usefixtures("no_figures")
def test_the_command_of_a_run_is_shown_as_it_was_launched(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run") / "config.yaml"
    config.write_text(re.sub("^command: .*$", "command: python train.py 'a=<b>'", config.read_text(), flags=re.M))
    report.main([str(tmp_path)])
    assert "<code>python train.py &#39;a=&lt;b&gt;&#39;</code>" in (tmp_path / "report" / "index.html").read_text()
    assert "  - `python train.py 'a=<b>'`" in (tmp_path / "report" / "report.md").read_text()
    with (tmp_path / "report" / "runs.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["command"] == "python train.py 'a=<b>'"


def test_a_second_report_is_identical(pages: Path, sweep: Path) -> None:
    before = (pages / "index.html").read_bytes()
    report.main([str(sweep)])
    assert (pages / "index.html").read_bytes() == before


def test_a_measured_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run")
    np.savez(folder / "condensation.npz", histogram=np.full((3, 128), 0.5))
    (folder / "condensation.json").write_text('{"source": "run at step 40"}')
    (write_run(tmp_path / "other", "seed=2") / "condensation.npz").write_bytes(b"PK\x03\x04 cut short")
    drawn: list[list[str]] = []
    monkeypatch.setattr(figures, "density", lambda shown: drawn.append(list(shown)) or Figure())
    report.main([str(tmp_path)])
    assert drawn == [["run at step 40"]], "with the step that was measured"
    assert (tmp_path / "report" / "figures" / "density.svg").exists()


def test_the_page_of_many_long_runs_stays_small(tmp_path: Path) -> None:
    for number in range(16):
        settings = (f"seed={number % 2}", f"optim.lr={1e-3 * (1 + number // 2)}")
        write_run(tmp_path / f"r{number}", *settings, steps=2000)
    report.main([str(tmp_path)])
    assert (tmp_path / "report" / "index.html").stat().st_size < 16 * 5_000_000 / 200


@pytest.mark.usefixtures("no_figures")
def test_the_command_of_the_sweep_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "multirun.yaml").write_text("hydra: {overrides: {task: [experiment=lambda, 'seed=1,2']}}")
    report.main([str(tmp_path)])
    assert "python train.py -m experiment=lambda seed=1,2" in (tmp_path / "report" / "index.html").read_text()


def test_many_runs_are_read_quickly(tmp_path: Path) -> None:
    template = write_run(tmp_path / "r000")
    text, metrics = ((template / name).read_text() for name in ("config.yaml", "metrics.jsonl"))
    for number in range(1, 40):
        folder = tmp_path / f"r{number:03}"
        folder.mkdir()
        edited = text.replace("seed: 1337", f"seed: {number}")
        (folder / "config.yaml").write_text(edited.replace("lambda_disp: 0.1", f"lambda_disp: 0.{number % 7}"))
        (folder / "metrics.jsonl").write_text(metrics)
    began = time.perf_counter()
    rows = make_rows(read_runs(tmp_path))
    assert time.perf_counter() - began < 40 * 0.3, "0.3 s a run is a minute for 200"
    assert sum(len(seeds) for row in rows for seeds in row.cells.values()) == 40


def test_a_folder_without_runs_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere is not a folder"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="give one folder"):
        report.main([])


def test_a_runs_own_folder_is_told_from_the_folder_of_a_sweep(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run is a single run: give the folder that it is in, {tmp_path}$"):
        report.main([str(run)])


def test_losses_over_steps_have_a_line_per_run_named_by_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "MOST_LINES", 12)
    for seed in range(13):
        write_run(tmp_path / f"s{seed}", f"seed={seed}", loss=2.0 + seed, steps=20 if seed == 12 else 40)
    (write_run(tmp_path / "damaged") / "config.yaml").unlink()
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "losses", lambda runs, _: drawn.append(runs) or Figure())
    report.main([str(tmp_path)])
    names = [name for runs in drawn for name in runs]
    assert sorted(names) == sorted(f"seed={seed}" for seed in range(13))
    assert [len(runs) for runs in drawn] == [12, 1], "at most 12 lines in a figure"
    curves = {name: curve for runs in drawn for name, curve in runs.items()}
    assert [part.tolist() for part in curves["seed=3"]["train"]] == [[20, 40], [3.0, 3.0]]
    assert [part.tolist() for part in curves["seed=12"]["val"]] == [[0, 20], [14.0, 14.0]], "an unfinished run too"
    assert "figures/steps_2.png" in (tmp_path / "report" / "report.md").read_text()


def test_a_single_run_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "alone")
    drawn: list[list[str]] = []
    monkeypatch.setattr(figures, "losses", lambda runs, _: drawn.append(list(runs)) or Figure())
    report.main([str(tmp_path)])
    assert drawn == [["alone"]]
    assert "1 run: 1 finished" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_figures")
def test_failed_runs_alone_make_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "error.txt").write_text("")
    report.main([str(tmp_path)])
    assert "1 run: 1 failed" in (tmp_path / "report" / "report.md").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """<script>
addEventListener("load", () => {
  const page = document.documentElement, pictures = [...document.querySelectorAll("figure svg")];
  const cut = [...document.querySelectorAll("td, th, code, figcaption")].filter(e => e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display != "inline");
  document.title = [page.scrollWidth <= innerWidth, pictures.length > 0,
    pictures.every(p => p.getBoundingClientRect().width > 200 && p.getBBox().width > 200), cut.length].join(" ");
})</script>"""
FILTER = """<script>
addEventListener("load", () => {
  const count = of => [...document.querySelectorAll(of)].filter(e => e.style.display != "none").length;
  const line = "figure g[id='lambda_disp=0.1 seed=1']";
  const seen = () => [count("article"), count("tr[data-kind]"), count(line)].join(" ");
  const choose = (key, value) => {
    const select = document.querySelector(`select[data-key="${key}"]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  const steps = [seen()];
  for (const [key, value] of [["dispersion.lambda_disp", "0.1"], ["seed", "2"], ["dispersion.lambda_disp", ""]]) {
    choose(key, value);
    steps.push(seen());
  }
  document.title = steps.join("; ");
})</script>"""


def title_in_browser(page: Path, script: str, folder: Path, width: int = 1280) -> str:
    """The title of a page in Chromium after a script that is added to it."""
    looked = folder / "index.html"
    looked.write_text(page.read_text().replace("</html>", script + "</html>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    options = (*options, f"--user-data-dir={folder}", f"--window-size={width},900", "--dump-dom")
    command = [str(CHROMIUM), *options, str(looked)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return "".join(re.findall("<title>(.*?)</title>", shown)[:1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_in_a_browser_nothing_is_cut_off_or_missing(pages: Path, tmp_path: Path, width: int) -> None:
    assert title_in_browser(pages / "index.html", LOOK, tmp_path, width) == "true true true 0"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_the_filter_hides_what_it_excludes(pages: Path, tmp_path: Path) -> None:
    everything, tenth, second, all_lambdas = title_in_browser(pages / "index.html", FILTER, tmp_path).split("; ")
    assert everything == "12 9 4"  # runs, rows, and parts of one run's line
    assert tenth == "5 7 4", "the rows of the other lambdas are hidden; a run without a configuration too"
    assert second == "1 7 0"
    assert all_lambdas == "3 9 0"
