"""The report's tables: rows, cells, differences from the baseline, and benchmarks."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from nanodisp.condensation import figures
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


def test_where_and_how_a_run_is_recorded_makes_no_other_row(tmp_path: Path) -> None:
    recorded = ("wandb.mode=offline", "wandb.tags=[a]", "tensorboard=true", "train.log_interval=7", "device=cpu")
    here, there = ("data.tokenizer=/a/data/text-own-1234/own.tiktoken", "data.tokenizer=/b/text-own-1234/own.tiktoken")
    write_run(tmp_path / "off", "dispersion=off", here, loss=3.0)
    write_run(tmp_path / "on", "dispersion.lambda_disp=0.1", there, *recorded, loss=2.0)
    [row] = make_rows(read_runs(tmp_path))
    assert [disp for disp, seeds in row.cells.items() if seeds] == [0.0, 0.1]
    other = "data.tokenizer=/b/text-own-5678/own.tiktoken"
    write_run(tmp_path / "other", "dispersion.lambda_disp=0.1", other, loss=2.0)
    assert [list(row.cells) for row in make_rows(read_runs(tmp_path))] == [[0.0, 0.1], [0.1]], "another corpus"


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


@pytest.mark.parametrize(
    "settings",
    [
        [("model.n_head=2",), ("model.n_head=4",)],
        [("model.block_size=16", "model.position=rotary"), ("model.block_size=8", "model.position=rotary")],
        [("model.block_size=16",), ("model.block_size=15",)],  # other counts of parameters, equal when rounded
        [("model.n_head=4", "model.n_kv_head=1"), ("model.n_head=4", "model.n_kv_head=2")],
    ],
    ids=str,
)
def test_models_of_one_size_that_differ_are_rows_of_their_own(tmp_path: Path, settings: list[tuple[str, ...]]) -> None:
    for number, model in enumerate(settings):
        for disp in (0, 0.1):
            write_run(tmp_path / f"{number}-{disp}", f"dispersion.lambda_disp={disp}", *model, loss=2.0 + number - disp)
    rows = make_rows(read_runs(tmp_path))
    assert len({row.label for row in rows}) == 2
    cells = [make_table([row], "loss", QUANTITIES["loss"], [0.0, 0.1])[0] for row in rows]
    assert {(off.text, on.difference) for off, on in cells} == {
        ("2.0000", "Δ \N{MINUS SIGN}0.1000"),
        ("3.0000", "Δ \N{MINUS SIGN}0.1000"),
    }


def test_the_heads_and_contexts_of_two_sizes_are_not_in_their_labels(tmp_path: Path) -> None:
    write_run(tmp_path / "small", "model.n_head=2")
    write_run(tmp_path / "large", "model.n_head=4", "model.n_embd=32", "model.block_size=8")
    assert all("n_head" not in row.label and "block_size" not in row.label for row in make_rows(read_runs(tmp_path)))


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
