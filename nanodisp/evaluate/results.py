"""Benchmark figures: read from the harness's results, written to evaluation.json, printed as a table."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanodisp.errors import UserError
from nanodisp.files import finite, write_whole
from nanodisp.runs.evaluation import items_file, main_metric

NUMBERS = re.compile(r"\[(?:\s+(?:[-\d.e+]+|null),?)+\s+\]")  # a list of numbers, which is written as one line


def entries(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks of the harness's results and their figures; of a group with figures of its own, only the group."""
    within = {child for group, children in results["group_subtasks"].items() for child in children}
    names = [name for name in results["results"] if name not in within]
    for name in names:
        metrics = dict(metrics_of(results, name))
        if not metrics:  # a group without figures of its own: its tasks instead
            names += results["group_subtasks"].get(name, [])
            continue
        leaves = list(leaves_of(results["group_subtasks"], name))
        shots = {results["n-shot"][leaf] for leaf in leaves}
        yield (
            name,
            {
                "metrics": metrics,
                "shots": shots.pop() if len(shots) == 1 else None,
                "examples": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                "version": results["versions"].get(name),
            },
        )


def leaves_of(subtasks: dict[str, list[str]], name: str) -> Iterator[str]:
    """The tasks of a group at any depth, or the task itself."""
    if not subtasks.get(name):
        yield name
    for child in subtasks.get(name, []):
        yield from leaves_of(subtasks, child)


def metrics_of(results: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A task's metrics: value, standard error, whether higher is better. Each filter of a metric counts as one."""
    for key, value in results["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = results["results"][name].get(f"{metric}_stderr,{filtered}")
        yield (
            metric if filtered == "none" else key,
            {
                "value": number_or_none(value),
                "stderr": number_or_none(stderr),
                "higher_is_better": (results["higher_is_better"].get(name) or {}).get(metric),
            },
        )


def number_or_none(value: Any) -> float | None:
    """None for NaN, and for the harness's "N/A"."""
    return finite(float(value)) if isinstance(value, (int, float)) else None


def save(path: Path, evaluation: dict[str, Any]) -> None:
    """Write evaluation.json, completely or not at all."""
    make_folder(path)
    text = json.dumps(evaluation, indent=2)
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    write_whole(path, text.encode() + b"\n")


def make_folder(path: Path) -> None:
    """The folder of a file; raises UserError if there cannot be one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another with out=…") from error


def items_of(results: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    """Each metric of a task by item, in their order: float32 [n], or [n, 2] of a sum and its weight.

    Of a group, those of its tasks one after the other. Without metrics that only some items have.
    """
    leaves = leaves_of(results["group_subtasks"], name)
    samples = [each for leaf in leaves for each in sorted(results["samples"][leaf], key=lambda each: each["doc_id"])]
    found: dict[str, np.ndarray] = {}
    for filtered in dict.fromkeys(sample["filter"] for sample in samples):
        rows = [sample for sample in samples if sample["filter"] == filtered]
        for metric in rows[0]["metrics"]:
            try:
                key = metric if filtered == "none" else f"{metric},{filtered}"
                found[key] = np.array([row[metric] for row in rows], dtype=np.float32)
            except (KeyError, ValueError, TypeError):  # not in all items, or not a number
                continue
    return found


def save_items(evaluation: Path, by_task: dict[str, dict[str, np.ndarray]]) -> None:
    """Add the items of tasks to the file beside an evaluation.json, or replace them."""
    make_folder(evaluation)
    path = items_file(evaluation)
    arrays = {key: value for key, value in read_items(path).items() if key.split("/")[0] not in by_task}
    arrays |= {f"{task}/{metric}": value for task, found in by_task.items() for metric, value in found.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def read_items(path: Path) -> dict[str, np.ndarray]:
    """{"task/metric": one value for each item}, {} without the file; UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not what nanodisp.evaluate writes: delete it and evaluate again") from error


def table(figures: dict[str, Any]) -> str:
    """A line per metric of each task, and the mean of each task's `main_metric` if higher is better."""
    lines = [f"{'task':24} {'metric':18} {'value':>9} {'stderr':>8} {'shots':>5} {'examples':>8}"]
    show = lambda value: "\N{EN DASH}" if value is None else f"{value:.4f}"  # noqa: E731
    for task, entry in figures.items():
        for metric, figure in entry["metrics"].items():
            shots = "mixed" if entry["shots"] is None else entry["shots"]
            value, stderr = show(figure["value"]), show(figure["stderr"])
            lines.append(f"{task:24} {metric:18} {value:>9} {stderr:>8} {shots:>5} {entry['examples']:8,}")
    if rising := averaged(figures):
        mean = sum(figure["value"] for figure in rising.values()) / len(rising)
        errors = [figure["stderr"] for figure in rising.values()]
        error = None if None in errors else math.hypot(*errors) / len(errors)
        lines.append(f"{'mean':24} {f'of {len(rising)} tasks':18} {mean:9.4f} {show(error):>8}")
    for task, entry in figures.items():
        if entry.get("cut"):
            lines.append(f"{task}: {entry['cut']:,} texts are longer than the context and lost their beginning")
    return "\n".join(lines)


def averaged(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `main_metric` of each task that counts in a mean over tasks: where higher is better."""
    chosen = {task: entry["metrics"][main_metric(entry)] for task, entry in figures.items()}
    return {task: each for task, each in chosen.items() if each["higher_is_better"] and each["value"] is not None}


def describe_checkpoints(by_step: dict[int, dict[str, Any]]) -> str:
    """A line per checkpoint: the `main_metric` of each task and their mean; then the best by this mean and the last."""
    values = {
        step: {task: each["value"] for task, each in averaged(figures).items()} for step, figures in by_step.items()
    }
    names = [task for task in values[max(values)] if all(task in each for each in values.values())]
    if not names:
        return ""
    means = {step: sum(each[task] for task in names) / len(names) for step, each in values.items()}
    lines = ["  ".join(["step".rjust(10), *(f"{name:>8}" for name in [*names, "mean"])])]
    for step, each in values.items():
        row = [f"{each[name]:{max(8, len(name))}.4f}" for name in names]
        lines.append("  ".join([f"{step:10,}", *row, f"{means[step]:8.4f}"]))
    best, last = max(means, key=means.__getitem__), max(means)
    lines.append(
        f"best of {len(means)} checkpoints by the mean: {means[best]:.4f} at step {best:,}; last: {means[last]:.4f} at "
        f"step {last:,}; choosing the best adds {means[best] - means[last]:.4f}"
    )
    return "\n".join(lines)
